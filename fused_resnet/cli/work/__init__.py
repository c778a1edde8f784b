"""What the commands do once their options are read. To import one of these loads torch and rich."""
