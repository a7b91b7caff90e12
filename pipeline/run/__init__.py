"""One run on disk, how its steps begin and end, and where its work is done."""
