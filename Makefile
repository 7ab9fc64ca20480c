# The checks that every change passes: make check. Everything runs in .venv/, which the first of them sets up.
.PHONY: check setup style docs site settings plan test

check: style docs test

setup:
	bash launch/setup.sh dev

style: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# README and docs: commands parse, examples run, links lead somewhere, tables are the committed results.
docs: setup
	.venv/bin/python -m pytest -q tests/test_docs.py tests/test_site.py

# The site, in build/site: docs/ with a reference from the docstrings.
site: setup
	.venv/bin/mkdocs build --strict

# configs/schema.json and the tables of docs/guide/config.md, from the sections in the code and the comments in configs/reference.
settings: setup
	.venv/bin/mitrain config --schema > configs/schema.json.new && mv configs/schema.json.new configs/schema.json
	sed '/^## every run/,$$d' docs/guide/config.md > docs/guide/config.md.new
	.venv/bin/mitrain config --keys --markdown >> docs/guide/config.md.new && mv docs/guide/config.md.new docs/guide/config.md

# Which folder imports which, drawn from the code.
plan:
	.venv/bin/python tests/test_layers.py

test:
	bash launch/test.sh
