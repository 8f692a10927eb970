"""What the twelve two-dimensional MedMNIST sets ask: their classes, tasks and modalities as published. No files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MedMnistSet:
    """One published set: what is asked, the classes by their label, and what kind of task and image it is."""

    question: str
    classes: tuple[str, ...]
    task_type: str
    modality: str

    @property
    def multi_label(self) -> bool:
        return self.task_type.startswith("multi-label")

    def question_about(self, finding: str) -> str:
        """The question of a multi-label set about one of its labels."""
        return self.question.format(finding=_FINDINGS.get(finding, finding))


_ORGANS = (
    "bladder",
    "femur-left",
    "femur-right",
    "heart",
    "kidney-left",
    "kidney-right",
    "liver",
    "lung-left",
    "lung-right",
    "pancreas",
    "spleen",
)

SETS = {
    "pathmnist": MedMnistSet(
        "Which tissue does this image of a colon biopsy show?",
        (
            "adipose",
            "background",
            "debris",
            "lymphocytes",
            "mucus",
            "smooth muscle",
            "normal colon mucosa",
            "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium",
        ),
        "multi-class",
        "Pathology",
    ),
    "chestmnist": MedMnistSet(
        "Does this chest X-ray show {finding}?",
        (
            "atelectasis",
            "cardiomegaly",
            "effusion",
            "infiltration",
            "mass",
            "nodule",
            "pneumonia",
            "pneumothorax",
            "consolidation",
            "edema",
            "emphysema",
            "fibrosis",
            "pleural",
            "hernia",
        ),
        "multi-label, binary-class",
        "X-Ray",
    ),
    "dermamnist": MedMnistSet(
        "Which skin lesion does this dermatoscope image show?",
        (
            "actinic keratoses and intraepithelial carcinoma",
            "basal cell carcinoma",
            "benign keratosis-like lesions",
            "dermatofibroma",
            "melanoma",
            "melanocytic nevi",
            "vascular lesions",
        ),
        "multi-class",
        "Dermatoscopy",
    ),
    "octmnist": MedMnistSet(
        "What does this optical coherence tomography of a retina show?",
        ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
        "multi-class",
        "OCT",
    ),
    "pneumoniamnist": MedMnistSet(
        "What does this chest X-ray of a child show?", ("normal", "pneumonia"), "binary-class", "X-Ray"
    ),
    "retinamnist": MedMnistSet(
        "Which grade of diabetic retinopathy, 0 (none) to 4 (proliferative), does this fundus image show?",
        ("0", "1", "2", "3", "4"),
        "ordinal-regression",
        "Fundus",
    ),
    "breastmnist": MedMnistSet(
        "What does this ultrasound image of a breast show?",
        ("malignant", "normal, benign"),
        "binary-class",
        "Ultrasound",
    ),
    "bloodmnist": MedMnistSet(
        "Which blood cell does this microscope image show?",
        (
            "basophil",
            "eosinophil",
            "erythroblast",
            "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)",
            "lymphocyte",
            "monocyte",
            "neutrophil",
            "platelet",
        ),
        "multi-class",
        "Microscopy",
    ),
    "tissuemnist": MedMnistSet(
        "Which cell of the kidney cortex does this microscope image show?",
        (
            "Collecting Duct, Connecting Tubule",
            "Distal Convoluted Tubule",
            "Glomerular endothelial cells",
            "Interstitial endothelial cells",
            "Leukocytes",
            "Podocytes",
            "Proximal Tubule Segments",
            "Thick Ascending Limb",
        ),
        "multi-class",
        "Microscopy",
    ),
    "organamnist": MedMnistSet("Which organ does this axial CT image show?", _ORGANS, "multi-class", "CT"),
    "organcmnist": MedMnistSet("Which organ does this coronal CT image show?", _ORGANS, "multi-class", "CT"),
    "organsmnist": MedMnistSet("Which organ does this sagittal CT image show?", _ORGANS, "multi-class", "CT"),
}
"""File name -> set. The classes are the published names, in the order of their labels."""

_FINDINGS = {"pleural": "pleural thickening"}
"""Published label -> how a question calls it, where the label alone is no noun."""
