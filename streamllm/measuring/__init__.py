"""What is measured and how sure it is: texts, protocols, times in turn, qualities, the store."""
