"""The embedded testbed: a small trained GPT-NeoX, and a held-out text to evaluate it on; README.md is the card."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
TEXT_FILE = Path(__file__).parent / "text.txt"
