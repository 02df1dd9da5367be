"""Types of command-line arguments: what argparse calls with the text, and what it may say of it."""

import argparse


def group_size(text: str) -> int | str:
    """A group's size along K, or "column"."""
    if text == "column" or (text.isdecimal() and int(text) > 0):
        return text if text == "column" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a size of at least 1 nor 'column'")


def counts(text: str) -> list[int]:
    """Whole numbers from 1 up, with commas between."""
    parts = text.split(",")
    if all(part.isdecimal() and int(part) > 0 for part in parts):
        return [int(part) for part in parts]
    raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers from 1 up, such as 1,16,64")
