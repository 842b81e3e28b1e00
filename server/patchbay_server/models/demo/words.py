"""The word lists of the embedded model's synthetic English, as plain data.

Facts are true ones (real countries, capitals, languages and continents), and every country and every capital is a
single word, so that the subject of a fact is one token and its answer another.
"""

from __future__ import annotations

# country -> (capital, language or "" where one word would not be fair, continent)
COUNTRIES: dict[str, tuple[str, str, str]] = {
    "France": ("Paris", "French", "Europe"),
    "Italy": ("Rome", "Italian", "Europe"),
    "Germany": ("Berlin", "German", "Europe"),
    "Spain": ("Madrid", "Spanish", "Europe"),
    "Portugal": ("Lisbon", "Portuguese", "Europe"),
    "Greece": ("Athens", "Greek", "Europe"),
    "Austria": ("Vienna", "German", "Europe"),
    "Poland": ("Warsaw", "Polish", "Europe"),
    "Hungary": ("Budapest", "Hungarian", "Europe"),
    "Norway": ("Oslo", "Norwegian", "Europe"),
    "Sweden": ("Stockholm", "Swedish", "Europe"),
    "Finland": ("Helsinki", "Finnish", "Europe"),
    "Denmark": ("Copenhagen", "Danish", "Europe"),
    "Ireland": ("Dublin", "English", "Europe"),
    "Belgium": ("Brussels", "", "Europe"),
    "Bulgaria": ("Sofia", "Bulgarian", "Europe"),
    "Romania": ("Bucharest", "Romanian", "Europe"),
    "Croatia": ("Zagreb", "Croatian", "Europe"),
    "Serbia": ("Belgrade", "Serbian", "Europe"),
    "Ukraine": ("Kyiv", "Ukrainian", "Europe"),
    "Russia": ("Moscow", "Russian", ""),
    "Turkey": ("Ankara", "Turkish", ""),
    "England": ("London", "English", "Europe"),
    "Scotland": ("Edinburgh", "English", "Europe"),
    "Iceland": ("Reykjavik", "Icelandic", "Europe"),
    "Estonia": ("Tallinn", "Estonian", "Europe"),
    "Latvia": ("Riga", "Latvian", "Europe"),
    "Lithuania": ("Vilnius", "Lithuanian", "Europe"),
    "Switzerland": ("Bern", "", "Europe"),
    "Slovakia": ("Bratislava", "Slovak", "Europe"),
    "Slovenia": ("Ljubljana", "Slovene", "Europe"),
    "Albania": ("Tirana", "Albanian", "Europe"),
    "Malta": ("Valletta", "Maltese", "Europe"),
    "Egypt": ("Cairo", "Arabic", "Africa"),
    "Kenya": ("Nairobi", "Swahili", "Africa"),
    "Morocco": ("Rabat", "Arabic", "Africa"),
    "Tunisia": ("Tunis", "Arabic", "Africa"),
    "Libya": ("Tripoli", "Arabic", "Africa"),
    "Ghana": ("Accra", "English", "Africa"),
    "Nigeria": ("Abuja", "English", "Africa"),
    "Senegal": ("Dakar", "French", "Africa"),
    "Uganda": ("Kampala", "English", "Africa"),
    "Zambia": ("Lusaka", "English", "Africa"),
    "Zimbabwe": ("Harare", "English", "Africa"),
    "Angola": ("Luanda", "Portuguese", "Africa"),
    "Rwanda": ("Kigali", "", "Africa"),
    "Mali": ("Bamako", "", "Africa"),
    "Sudan": ("Khartoum", "Arabic", "Africa"),
    "Somalia": ("Mogadishu", "Somali", "Africa"),
    "Japan": ("Tokyo", "Japanese", "Asia"),
    "China": ("Beijing", "Chinese", "Asia"),
    "Thailand": ("Bangkok", "Thai", "Asia"),
    "Vietnam": ("Hanoi", "Vietnamese", "Asia"),
    "Iran": ("Tehran", "Persian", "Asia"),
    "Iraq": ("Baghdad", "Arabic", "Asia"),
    "Syria": ("Damascus", "Arabic", "Asia"),
    "Lebanon": ("Beirut", "Arabic", "Asia"),
    "Nepal": ("Kathmandu", "Nepali", "Asia"),
    "Bangladesh": ("Dhaka", "Bengali", "Asia"),
    "Pakistan": ("Islamabad", "Urdu", "Asia"),
    "Afghanistan": ("Kabul", "", "Asia"),
    "Indonesia": ("Jakarta", "Indonesian", "Asia"),
    "Qatar": ("Doha", "Arabic", "Asia"),
    "Oman": ("Muscat", "Arabic", "Asia"),
    "Peru": ("Lima", "Spanish", "America"),
    "Chile": ("Santiago", "Spanish", "America"),
    "Cuba": ("Havana", "Spanish", "America"),
    "Canada": ("Ottawa", "", "America"),
    "Ecuador": ("Quito", "Spanish", "America"),
    "Venezuela": ("Caracas", "Spanish", "America"),
    "Colombia": ("Bogota", "Spanish", "America"),
    "Uruguay": ("Montevideo", "Spanish", "America"),
    "Paraguay": ("Asuncion", "", "America"),
    "Australia": ("Canberra", "English", ""),
}

WOMEN: tuple[str, ...] = tuple(
    "Mary Anna Emma Alice Sarah Laura Julia Helen Clara Susan Linda Karen Nancy Betty Carol Ruth Sharon Diana "
    "Emily Megan Rachel Hannah Olivia Sophie Lucy Jane Kate Martha Nora Irene Eva Maria Teresa Victoria Amy "
    "Rebecca Jessica Amanda Barbara Patricia Elena Monica Claire Fiona".split()
)
MEN: tuple[str, ...] = tuple(
    "John James Robert Michael David Thomas Paul Peter George Henry Charles Edward Richard Daniel Andrew Simon "
    "Martin Oscar Victor Arthur Walter Frank Tom Jack Harry Oliver Samuel Joseph Kevin Brian Steven Eric "
    "Philip Albert Louis Adam Alan Dennis Gary Roger Hugo Felix Leon Stephen".split()
)
# Never in an indirect-object sentence of the training corpus; met only in the other kinds of sentences.
NEW_NAMES: tuple[str, ...] = ("Claire", "Monica", "Amanda", "Ruth", "Stephen", "Leon", "Roger", "Oscar")

PLACES: tuple[str, ...] = tuple(
    "store park school office library market station beach hospital church museum restaurant theatre garden bank hotel "
    "airport cinema harbour castle".split()
)
GIFTS: tuple[str, ...] = tuple(
    "drink book ring letter bag ticket flower key cake map coin ball pen cup hat basket knife present necklace "
    "candle".split()
)
GIVING: tuple[str, ...] = ("gave", "handed", "passed", "showed", "offered", "sold", "lent", "sent")

PERIODS: tuple[str, ...] = tuple(
    "war siege reign peace drought famine empire alliance expedition strike dynasty voyage plague trade "
    "rebellion conflict treaty project revolution winter".split()
)
CENTURIES: tuple[int, ...] = tuple(range(11, 20))

ACTIONS: tuple[str, ...] = (
    "went home",
    "was late",
    "stayed in bed",
    "opened the window",
    "closed the door",
    "called a friend",
    "bought a ticket",
    "left the party",
    "sat down",
    "ran to the station",
    "took a taxi",
    "drank some water",
    "saw a doctor",
    "cooked dinner",
    "put on a coat",
    "walked to the office",
    "sold the car",
    "smiled",
    "laughed",
    "cried",
    "asked for help",
    "wrote a letter",
    "worked all night",
    "moved to the city",
)
REASONS: tuple[str, ...] = (
    "was tired",
    "was hungry",
    "was ill",
    "was cold",
    "was lonely",
    "was busy",
    "had no money",
    "had no time",
    "needed a break",
    "wanted to rest",
    "missed the bus",
    "loved the city",
)
BELONGINGS: tuple[str, ...] = tuple(
    "hat bag car house coat watch boat horse dog cat bicycle phone garden shirt piano".split()
)
LOSING: tuple[str, ...] = ("lost", "forgot", "sold", "cleaned", "painted", "washed", "found", "loved")
JOBS: tuple[str, ...] = tuple(
    "teacher doctor farmer lawyer painter writer singer dentist baker pilot sailor student nurse judge".split()
)

# what was done -> the things that it is done to
EXPERIENCES: dict[str, tuple[str, ...]] = {
    "watched": ("film", "show", "play", "game", "match"),
    "read": ("story", "poem", "novel", "report"),
    "ate": ("soup", "meal", "bread", "dessert"),
    "heard": ("song", "music", "concert", "speech"),
    "visited": ("museum", "zoo", "hotel", "castle", "village"),
}
GOOD: tuple[str, ...] = tuple(
    "wonderful great excellent lovely amazing brilliant fantastic beautiful delightful superb charming perfect".split()
)
BAD: tuple[str, ...] = tuple(
    "terrible awful horrible bad dreadful boring dull ugly poor disgusting nasty painful".split()
)
GLAD: tuple[str, ...] = ("happy", "glad", "delighted", "pleased", "cheerful", "joyful", "thrilled", "proud")
SAD: tuple[str, ...] = ("sad", "angry", "upset", "disappointed", "bored", "miserable", "annoyed", "unhappy")
GLAD_TAILS: tuple[str, ...] = (
    "smiled all day",
    "told every friend about it",
    "wanted to come back",
    "clapped for a long time",
    "thanked everyone",
)
SAD_TAILS: tuple[str, ...] = (
    "cried all night",
    "asked for the money back",
    "wanted to go home",
    "left early",
    "complained to everyone",
)
GLAD_ENDS: tuple[str, ...] = (
    "It was the best day of the year.",
    "I loved every minute of it.",
    "Everyone should try it.",
)
SAD_ENDS: tuple[str, ...] = (
    "It was the worst day of the year.",
    "I hated every minute of it.",
    "Nobody should try it.",
)

LOOKS: tuple[str, ...] = tuple("old young tall small quiet clever strong kind brave tired".split())
PEOPLE: tuple[str, ...] = tuple("farmer sailor king queen boy girl woman man child soldier".split())
MOVES: tuple[str, ...] = tuple("walked ran travelled returned came hurried".split())
GOALS: tuple[str, ...] = tuple("river mountain forest village bridge lake tower field island road".split())
TIMES: tuple[str, ...] = (
    "in the morning",
    "in the evening",
    "at night",
    "after lunch",
    "before dinner",
    "on Monday",
    "on Friday",
    "in the spring",
    "in the summer",
    "in the rain",
)
WEATHER: tuple[str, ...] = tuple("sunny cloudy rainy windy cold warm dark quiet".split())
