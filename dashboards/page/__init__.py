"""The parts of a report's page: HTML and data made of a study, and the page, style and scripts they go into."""
