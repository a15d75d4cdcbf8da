"""What tests of questions share."""

import csv


def write_mmlu(path, rows):
    """Writes {"dev/anatomy_dev.csv": rows, ...} as the official CSV files; returns the folder."""
    for name, content in rows.items():
        (path / name).parent.mkdir(exist_ok=True)
        with (path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(content)
    return path
