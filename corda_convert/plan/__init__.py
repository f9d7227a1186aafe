"""What will be done, before anything is done: integers and names only, no torch."""
