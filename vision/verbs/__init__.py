"""What the verbs of `polymamba vision` do: from flags to files."""
