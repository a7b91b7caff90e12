"""Results for people: the table at the end of each stage, the figures, and one self-contained page."""

from pipeline.report.page import write_report
from pipeline.report.plates import write_stage1_figures
from pipeline.report.terminal import print_stage1, print_stage2, stage1_table, stage2_table
from pipeline.report.trajectory import write_trajectory_figure

__all__ = [
    "print_stage1",
    "print_stage2",
    "stage1_table",
    "stage2_table",
    "write_report",
    "write_stage1_figures",
    "write_trajectory_figure",
]
