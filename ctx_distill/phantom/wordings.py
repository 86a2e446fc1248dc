"""The sentences of the reports. Braces are filled by `reports`: see `reports.words` for their names.

A finding's sentences are sets by style and by number: "one" has a side or none, "both" is bilateral. Each sentence
holds a term of `text/vocabularies/phantom.yaml`, and none that belongs to another finding.
"""

from __future__ import annotations

CT: dict[str, list[str]] = {
    "pleural effusion": [
        "There is a {size} {side} pleural effusion.",
        "{size} {side} pleural effusion layering dependently.",
        "Pleural fluid on the {side}, {size} in volume, with a density of simple fluid.",
        "{side} sided pleural effusion, {size}, measuring up to {depth} mm in depth.",
        "A {size} {side} pleural effusion is seen with passive change of the adjacent lung.",
    ],
    "pleural effusion/both": [
        "There are {size} bilateral pleural effusions.",
        "Bilateral pleural effusions, {size}, layering dependently.",
        "Pleural fluid on both sides, {size} in volume.",
        "{size} pleural effusions are present bilaterally.",
    ],
    "pneumothorax": [
        "There is a {size} {side} pneumothorax.",
        "{size} {side} pneumothorax with partial collapse of the lung.",
        "Free air in the {side} pleural space in keeping with a {size} pneumothorax.",
        "{side} sided pneumothorax, {size}, without midline shift.",
    ],
    "cardiomegaly": [
        "The heart is {degree} enlarged.",
        "{grade} cardiomegaly.",
        "There is {grade} enlargement of the heart.",
        "Cardiac enlargement of {grade} degree, predominantly of the left ventricle.",
        "Cardiomegaly is noted, {grade} in extent.",
    ],
    "consolidation": [
        "There is {spread} consolidation in the {lobe} with air bronchograms.",
        "{spread} airspace consolidation of the {lobe}.",
        "The {lobe} shows {spread} consolidation, in keeping with pneumonia.",
        "Dense consolidation with air bronchograms involves the {lobe}.",
        "{spread} consolidative change is present in the {lobe}.",
    ],
    "atelectasis": [
        "Band-like atelectasis at the {side} lung base with elevation of the hemidiaphragm.",
        "There is {grade} {side} basal atelectasis.",
        "{grade} atelectasis of the {side} lower lobe with volume loss.",
        "Linear atelectasis is seen at the {side} base, the hemidiaphragm is raised.",
        "Volume loss at the {side} base due to {grade} atelectatic bands.",
    ],
    "lung nodule": [
        "There is a {mm} mm nodule in the {lobe}.",
        "Solid pulmonary nodule in the {lobe} measuring {mm} mm.",
        "A solitary nodule of {mm} mm is seen in the {lobe}.",
        "{lobe}: well defined nodule, {mm} mm in diameter.",
        "Nodule in the {lobe} with a diameter of {mm} mm.",
    ],
    "lung mass": [
        "There is a spiculated mass in the {lobe} measuring {cm} cm.",
        "A {cm} cm mass is present in the {lobe}, suspicious for malignancy.",
        "Large lobulated mass of the {lobe}, {cm} cm in diameter.",
        "Pulmonary mass in the {lobe} with spiculated margins, {mm} mm in size.",
    ],
    "ground-glass opacity": [
        "Patchy ground-glass opacities in the {lung}.",
        "There are {spread} ground-glass opacities in the {lung}.",
        "The {lung} shows {spread} areas of ground-glass attenuation.",
        "{spread} ground glass opacity is seen in the {lung}, with preserved vessels.",
    ],
    "ground-glass opacity/both": [
        "Patchy bilateral ground-glass opacities.",
        "There are {spread} ground-glass opacities in both lungs.",
        "Both lungs show {spread} areas of ground-glass attenuation.",
        "{spread} ground glass opacity is seen bilaterally, with preserved vessels.",
    ],
    "emphysema": [
        "{grade} {pattern} emphysema.",
        "There is {grade} centrilobular emphysema, {pattern}.",
        "Emphysematous change of both lungs, {grade}, with flattening of the diaphragm.",
        "Both lungs are hyperinflated with {grade} emphysema.",
        "Multiple air-filled spaces with imperceptible walls in both lungs, in keeping with {grade} emphysema.",
    ],
    "pulmonary fibrosis": [
        "Subpleural reticular changes in both lower lobes, in keeping with {grade} pulmonary fibrosis.",
        "{grade} pulmonary fibrosis with basal predominance.",
        "There is {grade} fibrosis at both lung bases with subpleural reticulation.",
        "Basal and subpleural fibrotic changes of {grade} degree.",
        "Subpleural reticulation of both bases, consistent with fibrotic lung disease.",
    ],
    "pericardial effusion": [
        "There is a {size} pericardial effusion measuring {mm} mm.",
        "{size} pericardial effusion, up to {mm} mm in thickness.",
        "Pericardial fluid with a thickness of {mm} mm.",
        "A circumferential pericardial effusion is present, {size}.",
    ],
    "coronary calcification": [
        "{grade} coronary artery calcification.",
        "There are {grade} coronary calcifications.",
        "Calcified plaques of the coronary arteries, {grade}.",
        "{grade} calcification of the coronary arteries is noted.",
        "Coronary calcification of {grade} degree.",
    ],
    "hiatal hernia": [
        "There is a {size} hiatal hernia.",
        "{size} hiatus hernia containing part of the stomach.",
        "Sliding hiatal hernia, {size}, {mm} mm across.",
        "A {size} hiatal hernia with an air-fluid level is seen behind the heart.",
    ],
    "lymphadenopathy": [
        "Enlarged mediastinal lymph nodes, the largest {mm} mm in short axis.",
        "There is mediastinal and hilar lymphadenopathy with nodes of up to {mm} mm.",
        "Mediastinal lymphadenopathy, up to {mm} mm.",
        "Several enlarged lymph nodes in the mediastinum measuring up to {mm} mm.",
        "Mediastinal adenopathy is present, the largest node measures {mm} mm.",
    ],
}

FILM: dict[str, list[str]] = {
    "pleural effusion": [
        "{size} {side} pleural effusion.",
        "Blunting of the {side} costophrenic angle, compatible with a {size} effusion.",
        "{side} effusion, {size}.",
        "Basal opacity on the {side} with a meniscus, consistent with pleural fluid.",
        "Increasing {side} pleural effusion.",
    ],
    "pleural effusion/both": [
        "{size} bilateral pleural effusions.",
        "Blunting of both costophrenic angles, compatible with {size} effusions.",
        "Bilateral effusions, {size}.",
        "Pleural fluid on both sides.",
    ],
    "pneumothorax": [
        "{size} {side} pneumothorax.",
        "{side} apical pneumothorax.",
        "Visible pleural line on the {side}: {size} pneumothorax.",
        "Pneumothorax on the {side}, {size}, no mediastinal shift.",
    ],
    "cardiomegaly": [
        "Cardiomegaly.",
        "The heart is enlarged.",
        "{grade} cardiomegaly.",
        "Enlarged cardiac silhouette.",
        "Cardiac silhouette is {degree} enlarged.",
    ],
    "consolidation": [
        "Consolidation in the {side} {zone} zone.",
        "Airspace opacity in the {side} {zone} zone, consistent with pneumonia.",
        "{side} {zone} zone airspace opacity.",
        "Confluent consolidation on the {side}, {zone} zone.",
        "{side} sided consolidation.",
    ],
    "atelectasis": [
        "{side} basilar atelectasis.",
        "Linear atelectasis at the {side} base.",
        "Plate-like atelectasis on the {side} with a raised hemidiaphragm.",
        "{side} lower zone volume loss and atelectasis.",
    ],
    "lung nodule": [
        "Nodule in the {side} {zone} zone.",
        "{side} {zone} zone nodule, about {mm} mm.",
        "Rounded nodular opacity on the {side}, {zone} zone.",
        "Solitary pulmonary nodule, {side} {zone} zone.",
    ],
    "lung mass": [
        "{side} {zone} zone mass of about {cm} cm.",
        "Mass in the {side} lung, CT is advised.",
        "Large rounded mass projecting over the {side} {zone} zone.",
        "{side} pulmonary mass.",
    ],
    "ground-glass opacity": [
        "Hazy opacity in the {side} lung.",
        "Faint hazy opacities on the {side}.",
        "Ground-glass opacity in the {side} lung.",
        "Ill-defined hazy opacity, {side} lung.",
    ],
    "ground-glass opacity/both": [
        "Hazy opacities in both lungs.",
        "Bilateral hazy opacities.",
        "Bilateral ground-glass opacities.",
        "Ill-defined hazy opacities bilaterally.",
    ],
    "emphysema": [
        "Hyperinflated lungs with flattened diaphragms.",
        "Emphysema.",
        "Hyperinflation in keeping with emphysema.",
        "Emphysematous lungs.",
    ],
    "pulmonary fibrosis": [
        "Reticular opacities at both bases.",
        "Basal interstitial fibrosis.",
        "Coarse reticular markings in both lower zones, likely pulmonary fibrosis.",
        "Fibrotic changes at both lung bases.",
    ],
    "pericardial effusion": [
        "Globular cardiac contour suggesting a pericardial effusion.",
        "Water-bottle heart, pericardial effusion.",
        "Pericardial effusion is suspected.",
        "Globular heart shadow as with pericardial fluid.",
    ],
    "coronary calcification": [
        "Coronary artery calcification.",
        "Coronary calcifications projecting over the heart.",
        "Calcified coronary arteries.",
        "Coronary calcification.",
    ],
    "hiatal hernia": [
        "Retrocardiac air-fluid level: hiatal hernia.",
        "Hiatal hernia.",
        "{size} hiatus hernia behind the heart.",
        "Retrocardiac density due to a hiatal hernia.",
    ],
    "lymphadenopathy": [
        "Prominent hila, suggesting lymphadenopathy.",
        "Hilar lymphadenopathy.",
        "Widened mediastinum with hilar adenopathy.",
        "Mediastinal lymphadenopathy.",
    ],
}

ABSENT: dict[str, list[str]] = {
    "pleural effusion": ["No pleural effusion.", "There is no pleural effusion.", "No pleural fluid."],
    "pneumothorax": ["No pneumothorax.", "There is no pneumothorax.", "No evidence of pneumothorax."],
    "cardiomegaly": ["No cardiomegaly.", "No cardiac enlargement."],
    "consolidation": ["No consolidation.", "No focal consolidation.", "There is no airspace consolidation."],
    "atelectasis": ["No atelectasis.", "There is no atelectasis."],
    "lung nodule": ["No nodule.", "No pulmonary nodules.", "There is no suspicious nodule."],
    "lung mass": ["No mass.", "No pulmonary mass.", "There is no mass."],
    "ground-glass opacity": ["No ground-glass opacities.", "There are no ground-glass opacities."],
    "emphysema": ["No emphysema.", "No evidence of emphysema."],
    "pulmonary fibrosis": ["No fibrosis.", "No evidence of pulmonary fibrosis."],
    "pericardial effusion": ["No pericardial effusion.", "There is no pericardial fluid."],
    "coronary calcification": ["No coronary calcification.", "No coronary artery calcifications."],
    "hiatal hernia": ["No hiatal hernia."],
    "lymphadenopathy": ["No lymphadenopathy.", "No enlarged lymph nodes.", "No mediastinal lymphadenopathy."],
}

PAIRS: list[tuple[str, str, str]] = [
    ("pleural effusion", "pneumothorax", "No pleural effusion or pneumothorax."),
    ("pleural effusion", "pneumothorax", "There is no effusion or pneumothorax."),
    ("pleural effusion", "pericardial effusion", "No pleural or pericardial effusion."),
    ("lung nodule", "lung mass", "No nodule or mass."),
    ("consolidation", "pleural effusion", "No consolidation or pleural effusion."),
]

LUNG = frozenset(
    {"consolidation", "atelectasis", "lung nodule", "lung mass", "ground-glass opacity", "emphysema"}
    | {"pulmonary fibrosis"}
)
# What a sentence of normality rules out, and the sentences, by style.
NORMAL: list[tuple[frozenset[str], list[str], list[str]]] = [
    (
        LUNG,
        ["The lungs are clear.", "Both lungs are clear.", "The lung parenchyma is unremarkable."],
        ["The lungs are clear.", "Clear lungs.", "Lungs are clear."],
    ),
    (
        frozenset({"pleural effusion", "pneumothorax"}),
        ["The pleural spaces are clear.", "The pleura is unremarkable."],
        ["Costophrenic angles are sharp.", "The pleural spaces are clear."],
    ),
    (
        frozenset({"cardiomegaly"}),
        ["The heart is normal in size.", "Heart size is normal.", "Normal heart size."],
        ["Heart size is normal.", "Normal cardiac silhouette.", "The heart is normal in size."],
    ),
    (
        frozenset({"lymphadenopathy"}),
        ["Mediastinal and hilar lymph nodes are normal in size.", "Lymph nodes are of normal size."],
        ["Hilar contours are normal.", "Hila are unremarkable."],
    ),
    (
        frozenset({"pericardial effusion"}),
        ["The pericardium is unremarkable.", "The pericardium is normal."],
        [],
    ),
]

CT_OPENING = [
    "Axial images of the chest were obtained {medium}.",
    "CT of the thorax {medium}.",
    "Multidetector CT of the chest {medium}, coronal and sagittal reformats.",
]
CT_FILLER = [
    "The trachea and main bronchi are patent.",
    "The thoracic aorta is of normal calibre.",
    "The thyroid gland is unremarkable.",
    "The visualised upper abdomen is unremarkable.",
    "Mild degenerative changes of the thoracic spine.",
    "The osseous structures are intact.",
    "The adrenal glands are normal.",
    "The oesophagus is unremarkable.",
]
FILM_OPENING = ["PA view of the chest.", "Frontal radiograph of the chest.", "AP erect film.", ""]
FILM_FILLER = ["Trachea is midline.", "Bones are intact.", "Osseous structures are unremarkable.", "No free air."]

CT_NORMAL = [
    "No acute abnormality of the chest.",
    "Normal CT of the chest.",
    "Unremarkable examination of the thorax.",
    "No significant abnormality.",
]
FILM_NORMAL = [
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "No acute cardiopulmonary process.",
    "Unremarkable chest film.",
]
