"""The numbers of the page, without markup: a module for each section."""
