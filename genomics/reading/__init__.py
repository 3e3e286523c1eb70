"""Files as people hold them -> records, labels, regions. Each module reads one kind of file."""
