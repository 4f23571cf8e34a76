"""Entity extractor: findings, positions and statuses in English and Chinese reports, by rules.

Rules stand in for the paper's trained extractor, because no public reports have entities annotated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["DISEASES", "FINDINGS", "NO_DISEASE", "Entity", "Kind", "Status", "clauses", "extract"]

#: The paper's classes, besides ``NO_DISEASE``.
DISEASES = (
    "diffuse parenchymal lung disease", "pulmonary calcification", "bullae", "lymph node enlargement", "fibrosis",
    "bronchiectasis", "emphysema", "pleural effusion", "cavity", "atelectasis", "pneumothorax", "tracheal mass",
    "mediastinal mass", "rib fracture",
)  # fmt: skip
NO_DISEASE = "no disease"


class Kind(StrEnum):
    FINDING = "finding"
    POSITION = "position"
    STATUS = "status"


class Status(StrEnum):
    """What a status says of the findings it is linked to."""

    ABSENT = "absent"
    UNCERTAIN = "uncertain"
    PRESENT = "present"
    NORMAL = "normal"  # said of an organ: what is named beside it is not there, or not ill


@dataclass(frozen=True)
class Entity:
    """A stretch ``text[start:end]`` of a report, in its clause (counted over the report)."""

    kind: Kind
    name: str
    start: int
    end: int
    clause: int


#: Finding -> pattern. English patterns are matched without regard to case, Chinese ones as they are.
FINDINGS: Mapping[str, str] = {
    "diffuse parenchymal lung disease": r"interstitial (?:lung |pulmonary )?(?:disease|pneumoni\w+|change\w*|pattern)|"
    r"honeycomb\w*|reticul(?:ar|ation)\w*|crazy[- ]paving|diffuse parenchymal lung disease|usual interstitial|"
    r"间质性(?:肺炎|改变|病变|肺病)|间质(?:病变|改变|纤维化|增厚)|蜂窝[状样]?|网[格状]+影|弥漫性(?:实质性)?(?:肺疾病|肺病变|病变)",
    "pulmonary calcification": r"(?:calcifi(?:ed|c)|calcification\w*)(?=[^.;]{0,40}(?:nodul|lung|lobe|granulom|"
    r"parenchym))|(?:lung|lobe|nodul\w*|granulom\w*)[^.;,]{0,30}calcif\w+|calcific nodul\w+|"
    r"(?:肺|叶|段|结节)[^。；，,]{0,10}钙化|钙化(?:灶|结节|影|点)",
    "bullae": r"\bbulla\w*|\bblebs?\b|bullous|肺大泡|肺大疱|肺气囊",
    "lymph node enlargement": r"lymphadenopath\w+|lymphadenomegal\w+|(?:enlarged|pathological\w*|conglomerate|"
    r"increased size)[^.;]{0,40}lymph ?nodes?|lymph ?nodes?[^.;]{0,60}(?:enlarge\w+|patholog\w+)|淋巴结[^。；，,]{0,8}"
    r"(?:肿大|增大|增多)|(?:肿大|增大)[^。；，,]{0,4}淋巴结",
    "fibrosis": r"fibro(?:sis|tic|us)\w*|fibroatelecta\w+|sequel\w*|纤维化|纤维[条索灶]+影?|条索[状灶]?影?",
    "bronchiectasis": r"bronchiecta\w+|bronchial dilat\w+|dilat\w+ (?:of the )?bronch\w+|支气管扩张|支扩",
    "emphysema": r"emphysem\w+|肺气肿",
    "pleural effusion": r"pleur\w+[^.;,]{0,25}(?:fluid|effusion)\w*|hydrothora\w+|"
    r"(?<!pericardial )(?<!pericardial-)effusion\w*"
    r"(?![^.;,]{0,12}pericard)|胸腔?[^。；，,]{0,8}积液|胸水",
    "cavity": r"\bcavit(?:y|ies|ar\w+|at\w+)\b(?! of)|空洞|空腔",
    "atelectasis": r"atelecta\w+|collaps\w+|肺不张|膨胀不全",
    "pneumothorax": r"(?:hydro)?p?neumothora\w+|气胸",
    "tracheal mass": r"(?:mass|tumou?r|lesion|nodule|polyp)\w*[^.;,]{0,25}trache\w+|"
    r"trache\w+[^.;,]{0,25}(?:mass|tumou?r|lesion|polyp)\w*|endotracheal (?:mass|lesion|tumou?r)|"
    r"(?<!支)气管[^。；，,]{0,6}(?:肿物|肿块|占位|肿瘤)",
    "mediastinal mass": r"mediastin\w+[^.;,]{0,40}(?:mass|tumou?r|space-occupying|thymoma)\w*|(?:mass|tumou?r|"
    r"lesion)\w*[^.;,]{0,40}mediastin\w+|thymoma|纵隔[^。；，,]{0,6}(?:肿物|肿块|占位|肿瘤)|胸腺瘤",
    "rib fracture": r"ribs?\b[^.;]{0,40}fractur\w+|fractur\w+[^.;]{0,40}\bribs?\b|肋骨?[^。；，,]{0,10}骨折|"
    r"肋[^。；，,]{0,6}骨皮质(?:中断|不连续)",
    # Other things that reports are about, and that heads for other label sets need.
    "medical material": r"catheter\w*|stent\w*|pacemaker\w*|prosthe\w+|sutur\w+|\bport\b|electrode\w*|tube\b|clips?\b|"
    r"sternotomy|cannula\w*|\bICD\b|\bdrain\b|valve replacement|置管|导管|起搏器|支架|金属内固定",
    "arterial calcification": r"athero\w+|(?:calcif\w+)[^.;]{0,60}(?:aort\w+|arter\w+|vascular|arch|supraaortic)|"
    r"(?:aort\w+|arter\w+|vascular)[^.;]{0,60}calcif\w+|(?:主动脉|动脉)[^。；，,]{0,8}(?:钙化|硬化)",
    "coronary calcification": r"(?:coronar\w+|\bLAD\b|\bRCA\b|\bCX\b|circumflex)[^.;]{0,60}(?:calcif|athero|plaque)\w*|"
    r"(?:calcif|athero|plaque)\w*[^.;]{0,80}(?:coronar\w+|\bLAD\b|\bRCA\b)|coronary stent\w*|"
    r"冠[状脉]+[^。；，,]{0,8}钙化",
    "cardiomegaly": r"cardiomegal\w*|(?:heart|cardiac|atri\w+|ventric\w+|cardiothoracic)[^.;]{0,50}(?:increas\w+|"
    r"enlarg\w+|larger|dilat\w+)|心影[^。；，,]{0,4}(?:增大|扩大)|心脏(?:增大|扩大)",
    "pericardial effusion": r"pericard\w+[^.;]{0,50}(?:effusion|fluid)\w*|(?:effusion|fluid)\w*[^.;,]{0,30}pericard\w+|"
    r"心包[^。；，,]{0,4}积液",
    "hiatal hernia": r"hiat\w+ herni\w*|hernia\w*[^.;]{0,30}hiat\w+|sliding herni\w*|食管裂孔疝",
    "lymph node": r"lymph ?nodes?|淋巴结",
    "nodule": r"nodul\w+|结节",
    "opacity": r"ground[- ]?glass\w*|opaci\w+|densit(?:y|ies) increas\w+|infiltra\w+|磨玻璃|片状影|斑片影|密度增高影",
    "consolidation": r"consolidat\w+|实变",
    "mosaic attenuation": r"mosaic\w*|air trapping|马赛克",
    "peribronchial thickening": r"peribronchial[^.;]{0,30}thick\w+|bronchial wall[^.;]{0,20}thick\w+|"
    r"thick\w+[^.;]{0,30}(?:peribronchial|bronchial walls?)|支气管壁增厚",
    "septal thickening": r"(?:inter|intra)lobular sept\w+|sept\w+ thick\w+|小叶间隔增厚",
    "mass": r"\bmass(?:es)?\b|tumou?r\w*|space-occupying|肿块|肿物|占位",
}

_POSITIONS: Mapping[str, str] = {
    "right": r"\bright\b|右",
    "left": r"\bleft\b|左",
    "both": r"\bboth\b|bilateral\w*|双|两",
    "upper lobe": r"upper lobe\w*|apic\w+|上叶|肺尖",
    "middle lobe": r"middle lobe\w*|lingul\w+|中叶|舌[叶段]",
    "lower lobe": r"lower lobe\w*|basal\b|下叶|基底段",
    "lung": r"\blungs?\b|parenchym\w+|pulmonary|肺",
    "pleura": r"pleura\w*|hemithora\w+|胸膜|胸腔",
    "mediastinum": r"mediastin\w+|paratracheal|subcarinal|prevascular|纵隔|隆突下",
    "hilum": r"\bhil(?:um|ar|us)\w*|肺门",
    "airways": r"trachea\w*|bronch(?:us|i)\b|气管|支气管(?!扩张|壁)",
    "heart": r"\bheart\b|cardiac|pericard\w+|心",
    "vessels": r"aort\w+|arter\w+|coronar\w+|动脉",
    "bone": r"\bribs?\b|bone\w*|vertebra\w*|stern\w+|肋|骨|椎",
    "abdomen": r"liver|kidney\w*|spleen|adrenal\w*|gallbladder|abdom\w+|pancrea\w+|肝|肾|脾|胆|上腹",
    "other": r"thyroid\w*|breast\w*|axilla\w*|esophag\w+|甲状腺|乳腺|腋|食管",
}

_STATUSES: Mapping[Status, str] = {
    Status.ABSENT: r"\bno\b|\bnot\b|\bwithout\b|\babsen\w+|\bnone\b|negative for|free of|"
    r"未见|无|没有|未发现|未显示|未提示",
    Status.UNCERTAIN: r"\?|possib\w+|probab\w+|suspic\w+|suspect\w*|cannot be (?:excluded|ruled out)|may be\b|likely|"
    r"suggest\w+|could be\b|in favou?r of|consistent with|compatible with|可能|疑似?|考虑|待排|不除外|？",
    Status.PRESENT: r"(?:is|are|was|were|has been|have been) (?:observed|detected|seen|noted|present|measured|found|"
    r"available|watched)|there (?:is|are|was|were)\b|showing|shows?\b|可见|见(?!明显异常)|示|显示|提示|伴|存在",
    Status.NORMAL: r"\bnormal\w*|natural\w*|unremarkable|\bopen\b|preserved|within normal limits|"
    r"正常|清晰|通畅|未见(?:明显)?异常",
}

_ALL: tuple[tuple[Kind, str, re.Pattern[str]], ...] = tuple(
    (kind, name, re.compile(pattern, re.IGNORECASE))
    for kind, patterns in ((Kind.FINDING, FINDINGS), (Kind.POSITION, _POSITIONS), (Kind.STATUS, _STATUSES))
    for name, pattern in patterns.items()
)
#: A clause ends at these; not at the point of a number (3.5 mm).
_END = re.compile(r"(?<!\d)\.(?!\d)|(?<=\d)\.(?=\s)|[;!。；！\n\"•]|(?<=[\u4e00-\u9fff])[,，]")


def clauses(text: str) -> list[tuple[int, int]]:
    """Start and end of each clause: English sentences; in Chinese, where one sentence holds a list, also its parts."""
    found, start = [], 0
    for mark in _END.finditer(text):
        if text[start : mark.start()].strip():
            found.append((start, mark.start()))
        start = mark.end()
    if text[start:].strip():
        found.append((start, len(text)))
    return found


def extract(text: str) -> list[Entity]:
    """All entities of a report, in order; those of one kind may overlap (*calcified lymph node*)."""
    found = []
    for number, (start, end) in enumerate(clauses(text)):
        for kind, name, pattern in _ALL:
            for match in pattern.finditer(text, start, end):
                found.append(Entity(kind, name, match.start(), match.end(), number))
    return sorted(found, key=lambda item: (item.start, item.end))
