"""A small world with exact truth: pictures, words, a checker, a teacher, batches. A guest: no other package imports it but recipes."""
