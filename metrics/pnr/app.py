"""Demo page of the measure for a Space."""

import evaluate
import gradio

pnr = evaluate.load("pnr.py")
COLUMNS = {"predictions": "number", "references": "number", "query_ids": "str"}
EXAMPLE = [[0.9, 2, "a"], [0.2, 0, "a"], [0.5, 1, "a"]]


def compute(rows):
    """Compute the measure on a table with the columns predictions, references and query_ids."""
    return pnr.compute(**{column: rows[column].tolist() for column in COLUMNS})


page = gradio.Interface(
    compute,
    gradio.Dataframe(EXAMPLE, headers=list(COLUMNS), datatype=list(COLUMNS.values())),
    gradio.JSON(),
    title="PNR",
    description=pnr.description,
)

if __name__ == "__main__":
    page.launch()
