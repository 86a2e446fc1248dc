"""The embedded cohort: synthetic chest CTs, radiographs of other people, reports and the planted truth.

`cohort.write_cohort` writes a folder that every other part reads like any other data. The modules, in the order in
which a study comes to be: `anatomy` (a person), `findings` (what is planted), `thorax` and `lesions` (painted on a
`canvas`), `scan` or `projection` (the CT or the radiograph), `reports` (the words), `items` and `cohort` (the files).
"""
