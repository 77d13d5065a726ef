"""Questions: those to tune on, and those with checkable answers. Written for these measurements.

    python benchmarks/retrofit_questions.py > questions.jsonl

writes the 250 to tune on, as `mod answer` reads them.
"""

import json
import random
import re

FORMS = (
    "What is {}?",
    "Explain {} to a child.",
    "Write a short story about {}.",
    "Give me three facts about {}.",
    "Why is {} important?",
)
TOPICS = """
Paris, the moon, bread, photosynthesis, Python lists, football, the Roman Empire, cats, electricity, rain, the heart,
chess, Japan, volcanoes, music, democracy, the ocean, sleep, coffee, bicycles, Mozart, gravity, bees, the internet,
mountains, painting, trains, vitamins, dreams, glass, Brazil, dinosaurs, money, books, snow, sugar, robots, tea,
the sun, castles, a lost dog, courage, winter, gardens, maps, clocks, friendship, bridges, stars, salt
"""


def questions_to_tune_on() -> list[str]:
    """Every topic in every form, in an order that mixes them."""
    questions = [form.format(topic.strip()) for topic in TOPICS.split(",") for form in FORMS]
    random.Random(0).shuffle(questions)
    return questions


def is_right(said: str, words: tuple[str, ...]) -> bool:
    """Whether one of the words stands in what is said, by itself and not as a part of another word or number."""
    # A sign, as of degrees, may be followed by a letter.
    patterns = (rf"(?<![\w.]){re.escape(word)}" + (r"(?!\w|[.,]\d)" if word[-1].isalnum() else "") for word in words)
    return any(re.search(pattern, said, re.IGNORECASE) for pattern in patterns)


# One of the words must be in what a model says.
QUESTIONS: list[tuple[str, tuple[str, ...]]] = [
    ("What is the capital of France?", ("Paris",)),
    ("What is the capital of Italy?", ("Rome",)),
    ("What is the capital of Japan?", ("Tokyo",)),
    ("What is the capital of Spain?", ("Madrid",)),
    ("What is the capital of Germany?", ("Berlin",)),
    ("What is the capital of Egypt?", ("Cairo",)),
    ("What is the capital of Russia?", ("Moscow",)),
    ("What is the capital of Greece?", ("Athens",)),
    ("Which country is Barcelona in?", ("Spain",)),
    ("On which continent is Kenya?", ("Africa",)),
    ("On which continent is Brazil?", ("South America",)),
    ("Which ocean lies between Europe and North America?", ("Atlantic",)),
    ("What is the largest planet of the solar system?", ("Jupiter",)),
    ("Which planet is closest to the Sun?", ("Mercury",)),
    ("What does the Earth orbit?", ("Sun",)),
    ("What orbits the Earth at night in the sky?", ("Moon",)),
    ("What is the chemical formula of water?", ("H2O", "H₂O")),
    ("Which gas do humans need to breathe?", ("oxygen",)),
    ("Which gas do plants take in for photosynthesis?", ("carbon dioxide", "CO2", "CO₂")),
    ("At how many degrees Celsius does water boil?", ("100",)),
    ("At how many degrees Celsius does water freeze?", ("0 degrees", "zero", "0°", "0 °", "0 Celsius", "0C", "0 C")),
    ("What is frozen water called?", ("ice",)),
    ("How many days are in a week?", ("seven", "7")),
    ("How many months are in a year?", ("twelve", "12")),
    ("How many hours are in a day?", ("24", "twenty-four")),
    ("How many minutes are in an hour?", ("60", "sixty")),
    ("How many legs does a spider have?", ("eight", "8")),
    ("How many legs does a dog have?", ("four", "4")),
    ("How many sides does a triangle have?", ("three", "3")),
    ("How many wheels does a bicycle have?", ("two", "2")),
    ("What is 2 plus 2?", ("4", "four")),
    ("What is 5 plus 3?", ("8", "eight")),
    ("What is 10 minus 4?", ("6", "six")),
    ("What is 3 times 3?", ("9", "nine")),
    ("What color is the sky on a clear day?", ("blue",)),
    ("What color is grass?", ("green",)),
    ("What color is a ripe banana?", ("yellow",)),
    ("What color is snow?", ("white",)),
    ("What is the opposite of hot?", ("cold",)),
    ("What is the opposite of up?", ("down",)),
    ("What is the opposite of day?", ("night",)),
    ("What is the plural of mouse, the animal?", ("mice",)),
    ("What is a baby cat called?", ("kitten", "kittens")),
    ("What is a baby dog called?", ("puppy", "puppies")),
    ("Which animal gives us wool?", ("sheep",)),
    ("Which insect makes honey?", ("bee", "bees", "honeybee", "honeybees")),
    ("Which organ pumps blood through the body?", ("heart",)),
    ("With which organ do we think?", ("brain",)),
    ("Who wrote the play Romeo and Juliet?", ("Shakespeare",)),
    ("Who was the first president of the United States?", ("Washington",)),
    ("Who painted the Mona Lisa?", ("Leonardo", "da Vinci")),
    ("Who found the law of gravity, by the story of an apple?", ("Newton",)),
    ("Which language is spoken in Brazil?", ("Portuguese",)),
    ("Which language is spoken in France?", ("French",)),
    ("What is the currency of Japan?", ("yen",)),
    ("What is the currency of the United States?", ("dollar", "dollars")),
    ("Which season comes after winter?", ("spring",)),
    ("Which day comes after Monday?", ("Tuesday",)),
    ("Which month comes after March?", ("April",)),
    ("What do you call the person who flies an airplane?", ("pilot",)),
]


if __name__ == "__main__":
    for question in questions_to_tune_on():
        print(json.dumps({"messages": [{"role": "user", "content": question}]}))
