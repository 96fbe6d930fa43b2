# `make` says what there is. Set-up itself is scripts/setup.sh; it does nothing when nothing changed.

PYTHON ?=
TORCH ?= torch==2.13.0
PIP_ARGS ?=
export PYTHON TORCH PIP_ARGS

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm setup clean

help:
	@echo 'make demo       a controller, two workers and a question to a small model; sets .venv up first'
	@echo 'make test       lint, types and all tests; sets .venv up first'
	@echo 'make test-vllm  the tests with a real vLLM engine on the CPU; sets .venv-vllm up first'
	@echo 'make setup      only set .venv up, with everything that demo and test need'
	@echo 'make clean      remove .venv, .venv-vllm and what was built'
	@echo
	@echo 'PYTHON=python3.12      the interpreter to use (default: the first of python3, python3.14 ... python3.11 that is 3.11 or newer)'
	@echo 'TORCH=torch==2.13.0    the PyTorch to install first; PIP_ARGS=... goes to every pip install'

demo:
	@scripts/setup.sh demo
	@.venv/bin/python -m zmqserve.demo

test:
	@scripts/setup.sh test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest -m busy -n 2
	.venv/bin/pytest -m 'not busy' -n 4

# vLLM has an environment of its own: it pins PyTorch and much else.
test-vllm:
	@scripts/setup.sh vllm
	.venv-vllm/bin/pytest -m vllm tests/conformance tests/test_vllm_worker.py tests/test_hf_vllm_server.py tests/test_bench_vllm.py

setup:
	@scripts/setup.sh test

clean:
	rm -rf .venv .venv-vllm examples/node/node_modules build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
