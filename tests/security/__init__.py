"""Attempts of peers who mean harm, each with its typed outcome, while an honest stream runs beside them."""
