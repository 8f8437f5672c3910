"""Any bytes to the readers and graders of the package.  python -m tests.fuzz TARGET --seconds 600

`targets` are what is tried, `corpus` what they begin with. Without atheris, `test_fuzz` tries the corpus and a few
mutations of it.
"""
