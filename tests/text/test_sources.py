"""What `data` names is found, or refused with what would be right."""

import json
import os
from pathlib import Path

import pytest
from models import options, read

from mixture_of_depths.text.sources import Weighted, file_facts, find_files, sample_hash, unweighted, weighted


def test_weights_are_shares_of_their_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weighted(["a:0.6", "hub:b:de:0.2"]) == [Weighted("a", 0.6 / 0.8), Weighted("hub:b:de", 0.2 / 0.8)]
    assert weighted(["a", "b"]) == []
    # A configuration of the hub, no weight; and a file whose name ends like one.
    assert unweighted("hub:b:2018") == "hub:b:2018"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:0.5").write_text("")
    assert weighted(["a:0.5"]) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a:0.5", "b"], "data=b has no weight, and others have"),
        *(
            (data, f"data=a:{weight} has the weight {weight}, which is not a positive number")
            for weight in ("0.0", "0", "-0.5", "-2", "nan", "inf")
            for data in ([f"a:{weight}", "b:1.0"], [f"a:{weight}"])
        ),
        (["a:0.5", "a:0.25"], "data=a is named twice"),
        (["a\udcff:0.5", "b:0.5"], r"data='a\\udcff' is not UTF-8"),
        (["a:0.5", "./a:0.25"], "data=a is named twice"),
        (["a/../a:0.5", "b:0.25", "a/:0.25"], "is named twice"),
    ],
)
def test_weights_that_are_none_are_refused(data: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted(data)


def hub_cache(folder: Path, *revisions: str) -> Path:
    """A data set as the library of the hub keeps it: blobs, and links to them by revision."""
    cache = folder / "datasets--someone--numbers"
    (cache / "blobs").mkdir(parents=True)
    for revision in revisions:
        place = cache / "snapshots" / revision
        (place / "data").mkdir(parents=True)
        for split in ("train", "test"):
            blob = cache / "blobs" / f"{revision}-{split}"
            blob.write_text("".join(json.dumps({"text": f"{revision} {split} {i}"}) + "\n" for i in range(2)))
            (place / "data" / f"{split}-00000-of-00001.jsonl").symlink_to(os.path.relpath(blob, place / "data"))
        (place / "README.md").write_text("# Numbers\n")
    return cache


def test_a_folder_of_the_hub_s_cache_gives_the_split_of_its_main_revision(tmp_path: Path) -> None:
    cache = hub_cache(tmp_path, "abc", "def")
    with pytest.raises(ValueError, match="holds 2 revisions, and refs/main names none; name one of its snapshots/"):
        read(options(tmp_path, str(cache)))
    assert read(options(tmp_path, str(cache / "snapshots" / "abc")))[0] == ["abc train 0", "abc train 1"]
    # Only folders are revisions.
    (cache / "snapshots" / ".DS_Store").write_text("")
    (cache / "refs").mkdir()
    for nowhere in (b"\xff\xfe", b"", b"../..", b"a\0b"):
        (cache / "refs" / "main").write_bytes(nowhere)
        with pytest.raises(ValueError, match="refs/main names none"):
            read(options(tmp_path, str(cache)))
    (cache / "refs" / "main").write_text("def")
    assert read(options(tmp_path, str(cache)))[0] == ["def train 0", "def train 1"]
    assert read(options(tmp_path, str(cache), split="test"))[0] == ["def test 0", "def test 1"]


def test_files_of_tokens_are_taken_by_name_or_glob_and_not_beside_text(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"1234")
    assert find_files(str(tmp_path / "*.bin")) == find_files(str(tmp_path / "a.bin")) == [tmp_path / "a.bin"]
    (tmp_path / "a.txt").write_text("text")
    assert find_files(str(tmp_path)) == [tmp_path / "a.txt"]
    with pytest.raises(ValueError, match=r"names text and tokens \(.bin\); name one kind"):
        find_files(str(tmp_path / "*"))
    with pytest.raises(ValueError, match=r"a\.bin holds tokens, not text"):
        read(options(tmp_path, str(tmp_path / "a.bin")))


def test_json_is_taken_from_a_folder_only_where_it_is_compressed(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "a.json.gz").write_bytes(b"")
    assert [path.name for path in find_files(str(tmp_path))] == ["a.json.gz"]
    assert [path.name for path in find_files(str(tmp_path / "*.json"))] == ["settings.json"]


def test_facts_tell_a_changed_file_by_size_time_and_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(1000))
    before = file_facts(path)
    assert file_facts(path) == before
    path.write_bytes(bytes(999) + b"1")
    os.utime(path, ns=(before.modified_ns, before.modified_ns))
    assert file_facts(path).sample != before.sample
    for place in (0, 500, 999):
        content = bytearray(1000)
        content[place] = 1
        path.write_bytes(content)
        assert sample_hash(path, 1000, 10) != before.sample


def test_a_file_is_read_once_whatever_links_lead_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text" / "b[1]").mkdir(parents=True)
    (tmp_path / "text" / ".hidden").mkdir()
    for name in ("a.txt", "b[1]/c.txt", ".hidden/d.txt"):
        (tmp_path / "text" / name).write_text(name)
    (tmp_path / "text" / "b[1]" / "loop").symlink_to(tmp_path / "text")
    (tmp_path / "text" / "e.txt").symlink_to("a.txt")
    (tmp_path / "text" / "c").symlink_to("b[1]")
    (tmp_path / "far" / "g").mkdir(parents=True)
    (tmp_path / "far" / "g" / "f.txt").write_text("f")
    monkeypatch.chdir(tmp_path)
    texts = [Path("text/a.txt"), Path("text/b[1]/c.txt")]
    assert find_files("text") == [Path("text/.hidden/d.txt"), *texts]
    for pattern in ("text/**/*.txt", "text/**", "te*/**/**/*.txt", "**/text/**/*.txt"):
        assert find_files(pattern) == texts, pattern
    assert find_files(f"{tmp_path}/**/c.txt") == [tmp_path / texts[1]]
    # A link to a folder elsewhere is followed.
    (tmp_path / "text" / "far").symlink_to(tmp_path / "far")
    assert find_files("text/**/f.txt") == [Path("text/far/g/f.txt")]
    assert find_files("**/f.txt") == [Path("far/g/f.txt")]


def test_a_number_that_is_not_written_as_a_weight_is_refused_with_how_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a\n.txt"
    path.write_text("text")
    for number in ("1", "1e-3"):
        with pytest.raises(ValueError, match=f":{number} does not exist; write a weight with a decimal point, as "):
            unweighted(f"{path}:{number}")
    assert unweighted(f"{path}:0.5") == str(path)
    with pytest.raises(ValueError, match="has the weight NaN, which is not a positive number"):
        weighted([f"{path}:NaN"])


def test_a_name_that_no_file_can_have_does_not_exist_and_a_stream_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; give"):
        read(options(tmp_path, "x" * 300))
    with pytest.raises(ValueError, match="data=/dev/null is no regular file"):
        read(options(tmp_path, "/dev/null"))
