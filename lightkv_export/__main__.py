"""`python -m lightkv_export` is `lightkv`."""

from __future__ import annotations

import sys

from lightkv_export.cli import main

sys.exit(main())
