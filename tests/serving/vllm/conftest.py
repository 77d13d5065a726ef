"""Engines of vLLM in this process, over checkpoints of small models."""

import os

# Read by vLLM when it is imported: no process of its own, and no binding to cores that others use, too.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
