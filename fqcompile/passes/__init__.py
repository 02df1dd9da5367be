"""From capture to lower, one file each; `pipeline` has their order."""
