"""1. The frozen CLIP (being written)."""

import functools
import sys


class UserError(Exception):
    """What a user did wrong: one line that names the file or value and the way out."""


def command(main):
    """Wrap a command's `main(argv=None)`: a UserError becomes one line on stderr and exit status 2, no traceback."""

    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)

    return run


PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, RGB in 0..1
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
