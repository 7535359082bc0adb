"""Running and judging code that a model wrote. box.Sandbox is the front door.

box     asks for a program to be run            the caller's process
runner  forks quickly from a bare interpreter   one process per Sandbox
        isolates, starts both cells, watches    one process per program
judge   runs the check, holds the verdict       a cell
answer  runs the program that the model wrote   a cell
cell    a confined process                      kernel  the mechanisms of Linux that confine it
wire    the messages between them
"""
