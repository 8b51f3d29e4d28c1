"""A small world with exact truth: images, words, a checker, a teacher, batches. Only recipes and the command line import it."""
