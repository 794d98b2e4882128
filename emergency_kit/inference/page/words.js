// Words of the interface in three languages. Cards and answers stay as they are, in English.

const EN = {
  name: "Emergency Kit", skip: "Skip to the question", settings: "Display settings", language: "Language", largeText: "Large text", highContrast: "High contrast",
  emergencyNumber: "Emergency number", region: "Region", chooseRegion: "Choose your region", noRegion: "Call your local emergency number.",
  call: "Call {number}", callService: "{service}: {number}", or: "or {number}", ambulance: "Ambulance", fire: "Fire", police: "Police",
  question: "What is happening?", hint: "Call for help first. Then say it in a few words: who, what, where.",
  ask: "Get guidance", stop: "Stop", left: "{count} characters left",
  tokenTitle: "This kit asks for a token", tokenText: "Whoever runs it can give you one.", tokenWrong: "That token was refused. Check it and try again.", token: "Token", useToken: "Use this token",
  unsureTitle: "Is it one of these?", unsureText: "The kit is not sure which card fits. One tap answers from that card.",
  nearTitle: "Cards that may fit", nearText: "Found by the words they share with yours. Choose the one that fits.", noneOfThese: "None of these",
  checked: "Checked guidance", fitsOne: "From the card that fits what you wrote.", fitsNear: "Nearest cards; check which one fits.", fitsNone: "No card fits for certain. This is the safe minimum.", chosen: "From the card you chose.",
  modelAnswer: "The model's answer", modelText: "Written by a small model, word for word. It can be wrong; where it differs, follow the checked guidance.",
  danger: "Danger", doThis: "Do this, in order", never: "Never", findOut: "Find out", worse: "It gets worse when", differs: "Where guidance differs", signs: "Signs", sources: "Sources", more: "More about this, and sources",
  facts: "Facts", uncertainties: "Uncertainties", analysis: "Analysis", guidance: "Guidance", before: "Before the first section",
  struck: "Struck: it goes against “{rule}”", added: "Added from the checked card:", slip: "Shown as on the checked card.", ownWords: "The model's own words, on no card.", wrote: "The model wrote: {text}", unknownNumber: "Not on the cards: {number}", checks: "Checks and origin",
  fourSections: "Four sections", ended: "Ended by itself", guard: "Checked against the cards", yes: "yes", no: "no", model: "Model", kind: "Runs in", took: "Time", seconds: "{count} s", tokens: "Tokens", cardsVersion: "Cards", kitVersion: "Kit",
  readAloud: "Read aloud", stopReading: "Stop reading",
  looking: "Looking for the checked cards…", waiting: "Waiting in line: {count} before the model is free…", writing: "The model is writing. The checked guidance is already here.", done: "The answer is complete.", stopped: "Stopped. The answer is not whole.",
  offline: "No connection to the kit. The cards and earlier answers on this device still work.", offlineNothing: "No connection to the kit, and no cards are kept on this device yet. Call your local emergency number.",
  brokeOff: "The connection to the kit broke off. The answer is not whole; the checked guidance is.", refused: "The kit could not answer: {message}", empty: "Say in a few words what is happening.",
  history: "Earlier answers", historyText: "Kept on this device only.", forget: "Forget them all", allCards: "All cards", search: "Search the cards", cardCount: "{count} cards",
  notADoctor: "This is not a doctor, and no clinician has reviewed it. Call your local emergency number first.", medicalEnglish: "The cards and the answers are in English.",
};

const ES = {
  name: "Kit de emergencia", skip: "Ir a la pregunta", settings: "Ajustes de pantalla", language: "Idioma", largeText: "Texto grande", highContrast: "Alto contraste",
  emergencyNumber: "Número de emergencias", region: "Región", chooseRegion: "Elija su región", noRegion: "Llame al número de emergencias de su zona.",
  call: "Llamar al {number}", callService: "{service}: {number}", or: "o {number}", ambulance: "Ambulancia", fire: "Bomberos", police: "Policía",
  question: "¿Qué está pasando?", hint: "Primero pida ayuda por teléfono. Luego escriba en pocas palabras, mejor en inglés: quién, qué, dónde.",
  ask: "Ver qué hacer", stop: "Parar", left: "Quedan {count} caracteres",
  tokenTitle: "Este kit pide una clave", tokenText: "Se la puede dar la persona que lo gestiona.", tokenWrong: "La clave fue rechazada. Revísela e inténtelo de nuevo.", token: "Clave", useToken: "Usar esta clave",
  unsureTitle: "¿Es uno de estos casos?", unsureText: "El kit no está seguro de qué ficha corresponde. Un toque responde con esa ficha.",
  nearTitle: "Fichas que pueden corresponder", nearText: "Comparten palabras con su texto. Elija la que corresponda.", noneOfThese: "Ninguno de estos",
  checked: "Guía comprobada", fitsOne: "De la ficha que corresponde a lo que escribió.", fitsNear: "Fichas más cercanas; compruebe cuál corresponde.", fitsNone: "Ninguna ficha corresponde con certeza. Esto es lo mínimo seguro.", chosen: "De la ficha que eligió.",
  modelAnswer: "La respuesta del modelo", modelText: "Escrita por un modelo pequeño, palabra por palabra. Puede equivocarse; si no coincide, siga la guía comprobada.",
  danger: "Peligro", doThis: "Haga esto, en este orden", never: "Nunca", findOut: "Averigüe", worse: "Es más grave si", differs: "Donde las guías difieren", signs: "Señales", sources: "Fuentes", more: "Más sobre esto y fuentes",
  facts: "Hechos", uncertainties: "Dudas", analysis: "Análisis", guidance: "Qué hacer", before: "Antes de la primera sección",
  struck: "Tachado: contradice «{rule}»", added: "Añadido de la ficha comprobada:", slip: "Se muestra como en la ficha comprobada.", ownWords: "Palabras del propio modelo; no está en ninguna ficha.", wrote: "El modelo escribió: {text}", unknownNumber: "No está en las fichas: {number}", checks: "Comprobaciones y origen",
  fourSections: "Cuatro secciones", ended: "Terminó por sí sola", guard: "Contrastada con las fichas", yes: "sí", no: "no", model: "Modelo", kind: "Funciona en", took: "Tiempo", seconds: "{count} s", tokens: "Tokens", cardsVersion: "Fichas", kitVersion: "Kit",
  readAloud: "Leer en voz alta", stopReading: "Dejar de leer",
  looking: "Buscando las fichas comprobadas…", waiting: "En espera: {count} antes de que el modelo quede libre…", writing: "El modelo está escribiendo. La guía comprobada ya está aquí.", done: "La respuesta está completa.", stopped: "Detenido. La respuesta no está completa.",
  offline: "Sin conexión con el kit. Las fichas y las respuestas anteriores de este dispositivo siguen disponibles.", offlineNothing: "Sin conexión con el kit, y este dispositivo aún no guarda fichas. Llame al número de emergencias de su zona.",
  brokeOff: "Se cortó la conexión con el kit. La respuesta no está completa; la guía comprobada sí.", refused: "El kit no pudo responder: {message}", empty: "Escriba en pocas palabras qué está pasando.",
  history: "Respuestas anteriores", historyText: "Guardadas solo en este dispositivo.", forget: "Olvidarlas todas", allCards: "Todas las fichas", search: "Buscar en las fichas", cardCount: "{count} fichas",
  notADoctor: "Esto no es un médico y ningún profesional clínico lo ha revisado. Llame primero al número de emergencias de su zona.", medicalEnglish: "Las fichas y las respuestas están en inglés.",
};

const FR = {
  name: "Kit d'urgence", skip: "Aller à la question", settings: "Réglages d'affichage", language: "Langue", largeText: "Grand texte", highContrast: "Contraste élevé",
  emergencyNumber: "Numéro d'urgence", region: "Région", chooseRegion: "Choisissez votre région", noRegion: "Appelez le numéro d'urgence local.",
  call: "Appeler le {number}", callService: "{service} : {number}", or: "ou {number}", ambulance: "Ambulance", fire: "Pompiers", police: "Police",
  question: "Que se passe-t-il ?", hint: "Appelez d'abord les secours. Puis décrivez en quelques mots, de préférence en anglais : qui, quoi, où.",
  ask: "Voir quoi faire", stop: "Arrêter", left: "{count} caractères restants",
  tokenTitle: "Ce kit demande un jeton", tokenText: "La personne qui le gère peut vous en donner un.", tokenWrong: "Ce jeton a été refusé. Vérifiez-le et réessayez.", token: "Jeton", useToken: "Utiliser ce jeton",
  unsureTitle: "Est-ce l'un de ces cas ?", unsureText: "Le kit ne sait pas avec certitude quelle fiche convient. Un appui répond à partir de cette fiche.",
  nearTitle: "Fiches qui peuvent convenir", nearText: "Elles partagent des mots avec votre texte. Choisissez celle qui convient.", noneOfThese: "Aucun de ces cas",
  checked: "Conseils vérifiés", fitsOne: "D'après la fiche qui correspond à votre texte.", fitsNear: "Fiches les plus proches ; vérifiez laquelle convient.", fitsNone: "Aucune fiche ne convient avec certitude. Voici le minimum sûr.", chosen: "D'après la fiche que vous avez choisie.",
  modelAnswer: "La réponse du modèle", modelText: "Écrite par un petit modèle, mot pour mot. Elle peut être fausse ; en cas de différence, suivez les conseils vérifiés.",
  danger: "Danger", doThis: "Faites ceci, dans l'ordre", never: "Jamais", findOut: "À vérifier", worse: "C'est plus grave si", differs: "Là où les recommandations diffèrent", signs: "Signes", sources: "Sources", more: "En savoir plus, et sources",
  facts: "Faits", uncertainties: "Incertitudes", analysis: "Analyse", guidance: "Que faire", before: "Avant la première section",
  struck: "Rayé : contraire à « {rule} »", added: "Ajouté depuis la fiche vérifiée :", slip: "Affiché comme sur la fiche vérifiée.", ownWords: "Mots du modèle lui-même, sur aucune fiche.", wrote: "Le modèle a écrit : {text}", unknownNumber: "Absent des fiches : {number}", checks: "Contrôles et origine",
  fourSections: "Quatre sections", ended: "Terminée d'elle-même", guard: "Comparée aux fiches", yes: "oui", no: "non", model: "Modèle", kind: "Moteur", took: "Durée", seconds: "{count} s", tokens: "Jetons de texte", cardsVersion: "Fiches", kitVersion: "Kit",
  readAloud: "Lire à voix haute", stopReading: "Arrêter la lecture",
  looking: "Recherche des fiches vérifiées…", waiting: "En attente : {count} avant que le modèle soit libre…", writing: "Le modèle écrit. Les conseils vérifiés sont déjà là.", done: "La réponse est complète.", stopped: "Arrêté. La réponse n'est pas complète.",
  offline: "Pas de connexion avec le kit. Les fiches et les réponses précédentes de cet appareil restent disponibles.", offlineNothing: "Pas de connexion avec le kit, et cet appareil n'a pas encore de fiches. Appelez le numéro d'urgence local.",
  brokeOff: "La connexion avec le kit s'est interrompue. La réponse n'est pas complète ; les conseils vérifiés le sont.", refused: "Le kit n'a pas pu répondre : {message}", empty: "Décrivez en quelques mots ce qui se passe.",
  history: "Réponses précédentes", historyText: "Gardées sur cet appareil seulement.", forget: "Tout oublier", allCards: "Toutes les fiches", search: "Chercher dans les fiches", cardCount: "{count} fiches",
  notADoctor: "Ceci n'est pas un médecin, et aucun clinicien ne l'a relu. Appelez d'abord le numéro d'urgence local.", medicalEnglish: "Les fiches et les réponses sont en anglais.",
};

export const WORDS = { en: EN, es: ES, fr: FR };

export function pickLanguage(wanted) {
  return [...wanted].map((code) => code.slice(0, 2).toLowerCase()).find((code) => code in WORDS) ?? "en";
}

// Words of one language: t("left", {count: 3}).
export function translator(language) {
  const words = WORDS[language];
  return (key, values = {}) => words[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
