"""`python -m jobs.export --help`"""

from jobs.command import main
from pipeline.config import ExportSpec
from pipeline.export.export_stage import export

if __name__ == "__main__":
    main(ExportSpec, export)
