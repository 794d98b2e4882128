// Reads steps aloud with a voice of the browser's own, one that works offline where there is one.

const synthesis = globalThis.speechSynthesis;

export const canSpeak = () => Boolean(synthesis && globalThis.SpeechSynthesisUtterance);
export const isSpeaking = () => Boolean(synthesis?.speaking || synthesis?.pending);

export function speak(sentences, language, onEnd) {
  stopSpeaking();
  const voices = synthesis.getVoices().filter((voice) => voice.lang.toLowerCase().startsWith(language));
  const voice = voices.find((candidate) => candidate.localService) ?? voices[0] ?? null;
  sentences.forEach((sentence, index) => {
    const utterance = new SpeechSynthesisUtterance(sentence);
    utterance.lang = voice?.lang ?? language;
    utterance.voice = voice;
    utterance.rate = 0.95;
    utterance.onerror = onEnd;
    if (index === sentences.length - 1) utterance.onend = onEnd;
    synthesis.speak(utterance);
  });
}

export function stopSpeaking() {
  synthesis?.cancel();
}
