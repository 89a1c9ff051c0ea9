"""One Flax model definition: trained under TPU 8t profiles, served under TPU 8i profiles.

The package is laid out bottom-up; see the README for the commands and CONTRIBUTING.md for which
folder holds what. Nothing is imported here, so that `tpu-stack --help` starts at once.
"""

__version__ = "0.1.0"
