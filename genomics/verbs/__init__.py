"""What the verbs of `polymamba genomics` do: from flags to files."""
