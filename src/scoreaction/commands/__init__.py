"""The commands of `scoreaction`, one file each."""
