"""What must outlive a process: one SQL database and files that appear whole or not at all."""
