"""LightKV export toolkit: large vision-language models with prompt-guided merging of vision tokens, compiled.

Importing this package loads the standard library alone; heavy modules are imported by the commands that need them.
"""

__version__ = "0.1.0"
