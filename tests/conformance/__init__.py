"""What every backend must do alike, asked through a real network: `cases.py` says how a case is declared, `subjects.py` who is asked."""
