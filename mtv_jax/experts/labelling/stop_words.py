"""Words that are no phrases of their own.

Both lists are facts of OWLv2's recipe (Minderer et al. 2023): words that are
common beside images of the web and say nothing of what is in them, and the
English stop words that NLTK ships. They are written as
`tokenizers.canonicalize` leaves a word, so "don't" is here "dont".
"""

_GENERIC = """
  alibaba aliexpress amazon available background blog buy co com description
  diy download facebook free gif hd ideas illustration illustrations image
  images img instagram jpg online org original page pdf photo photography
  photos picclick picture pictures png porn premium resolution royalty sale sex
  shutterstock stock svg thumbnail tumblr tumgir twitter uk uploaded vector
  vectors video videos wallpaper wallpapers wholesale www xxx youtube
"""

_STOP = """
  i me my myself we our ours ourselves you youre youve youll youd your yours
  yourself yourselves he him his himself she shes her hers herself it its itself
  they them their theirs themselves what which who whom this that thatll these
  those am is are was were be been being have has had having do does did doing
  a an the and but if or because as until while of at by for with about against
  between into through during before after above below to from up down in out on
  off over under again further then once here there when where why how all any
  both each few more most other some such no nor not only own same so than too
  very s t can will just don dont should shouldve now d ll m o re ve y ain aren
  arent couldn couldnt didn didnt doesn doesnt hadn hadnt hasn hasnt haven
  havent isn isnt ma mightn mightnt mustn mustnt needn neednt shan shant shouldn
  shouldnt wasn wasnt weren werent won wont wouldn wouldnt
"""

GENERIC = frozenset(_GENERIC.split())
STOP = frozenset(_STOP.split())
