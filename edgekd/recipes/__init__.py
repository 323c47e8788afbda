"""What a recipe says: its tables, read with every fault at once."""
