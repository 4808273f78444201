"""What the commands do; `pyreid.cli` is what they look like."""
