"""What the verbs of `polymamba audio` do: from flags to files."""
