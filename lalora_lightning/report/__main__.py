"""The command ``python -m lalora_lightning.report LOG_FOLDER``."""

from lalora_lightning.report.page import main

if __name__ == "__main__":
    main()
