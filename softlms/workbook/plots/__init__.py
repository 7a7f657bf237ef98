"""The figures of the workbook."""
