"""Text as data: trimming a vocabulary, overlap between corpora, and the documents and answers of evaluation tasks."""
