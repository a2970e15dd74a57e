"""The report's sections: a module with its `SECTION`, and the partial template of the same name beside it."""
