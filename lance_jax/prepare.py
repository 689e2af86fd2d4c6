"""python -m lance_jax.prepare NAME [--data_dir DIR]

Prepares a data set of the TensorFlow Datasets catalogue once, as array_record, which the program
then reads without TensorFlow. Preparing needs it: pip install -e ".[data]".
"""

import argparse
import sys
from collections.abc import Sequence

from lance_jax import config, data


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="such as cifar100 or oxford_flowers102")
    parser.add_argument("--data_dir", default=config.DATA_DIR, help="[%(default)s]")
    given = parser.parse_args(arguments)
    try:
        data.prepare(given.name, given.data_dir)
    except ValueError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(f"{given.name} is prepared in {given.data_dir}")


if __name__ == "__main__":
    main()
