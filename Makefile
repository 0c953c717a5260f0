# What a contributor types; each target is a command of CONTRIBUTING.md.
.PHONY: install lint test digits

install:
	pip install -e '.[test]'

lint:
	ruff check .
	ruff format --check .

test: lint
	pytest

digits:
	torchrun train.py --config configs/digits.yaml
