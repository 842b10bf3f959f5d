//! The clients: streams with seeds, so that each has one right outcome.

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest that a stream may say nothing.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// What one stream yielded.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Stream {
    pub(super) text: String,
    /// When each piece came, in seconds after the start of the round.
    pub(super) pieces_s: Vec<f64>,
    pub(super) error: Option<String>,
}

impl Stream {
    /// The longest time between two pieces, of which the later came after `since_s`; `None` if none did.
    fn stall_s(&self, since_s: f64) -> Option<f64> {
        let gaps = self.pieces_s.windows(2).filter(|pair| since_s <= pair[1]);
        gaps.map(|pair| pair[1] - pair[0]).max_by(f64::total_cmp)
    }
}

/// What all streams of a round yielded.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    pub streams: usize,
    /// Streams that ended with an error, and the first one.
    pub lost: usize,
    pub first_error: Option<String>,
    /// Streams whose text is not the right one.
    pub different: usize,
    /// The longest stall since the first fault of every stream that was not over by then, ascending.
    pub stalls_s: Vec<f64>,
    /// Pieces of text per tenth of a second, of all streams.
    pub pieces: Vec<u32>,
    pub seconds: f64,
}

impl Outcome {
    /// The stall that `share` of the streams stay below.
    #[must_use]
    pub fn stall_s(&self, share: f64) -> f64 {
        let last = self.stalls_s.len().saturating_sub(1);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
        let index = (last as f64 * share).ceil() as usize;
        self.stalls_s.get(index).copied().unwrap_or(0.0)
    }
}

/// The streams of a scenario.
pub(super) struct Streams {
    url: String,
    model: String,
    count: u32,
    tokens: u32,
    expected: Vec<String>,
}

/// Streams that run.
pub(super) struct Running<'a> {
    pub(super) started: Instant,
    threads: Vec<JoinHandle<Stream>>,
    expected: &'a [String],
}

impl Streams {
    pub(super) fn new(url: &str, count: u32, tokens: u32) -> anyhow::Result<Self> {
        let mut answer = agent()
            .get(format!("{url}/v1/models"))
            .call()
            .with_context(|| format!("no herd router answers at {url}"))?;
        let models: Value = answer.body_mut().read_json()?;
        let model = models["data"][0]["id"].as_str().context("the router serves no model")?;
        let (url, model) = (url.to_owned(), model.to_owned());
        Ok(Self { url, model, count, tokens, expected: Vec::new() })
    }

    /// Runs all streams without a fault, and keeps what they yield as right.
    pub(super) fn in_peace(&mut self) -> anyhow::Result<Outcome> {
        let running = self.start();
        let started = running.started;
        let streams = join(running.threads);
        if let Some(error) = streams.iter().find_map(|stream| stream.error.as_ref()) {
            bail!("a stream fails in peace: {error}");
        }
        ensure!(streams.iter().all(|stream| !stream.text.is_empty()), "a stream is empty");
        self.expected = streams.iter().map(|stream| stream.text.clone()).collect();
        Ok(outcome((&streams, &self.expected), started.elapsed(), 0.0))
    }

    pub(super) fn start(&self) -> Running<'_> {
        let started = Instant::now();
        let thread = |seed| {
            let url = format!("{}/v1/chat/completions", self.url);
            let prompt = format!("Tell a long story about Carlos and number {seed}.");
            let body = json!({
                "model": self.model,
                "messages": [{ "role": "user", "content": prompt }],
                "max_tokens": self.tokens,
                "temperature": 0.7,
                "seed": seed,
                "ignore_eos": true,
                "stream": true,
            });
            std::thread::spawn(move || {
                let mut stream = Stream::default();
                if let Err(error) = follow(&url, &body, started, &mut stream) {
                    stream.error = Some(format!("{error:#}"));
                }
                stream
            })
        };
        Running {
            started,
            threads: (0..self.count).map(thread).collect(),
            expected: &self.expected,
        }
    }
}

impl Running<'_> {
    /// Waits for the streams to end. What stood still before `since_s`, when the first fault came, is not its doing.
    pub(super) fn finish(self, since_s: f64) -> Outcome {
        let streams = join(self.threads);
        outcome((&streams, self.expected), self.started.elapsed(), since_s)
    }
}

fn join(threads: Vec<JoinHandle<Stream>>) -> Vec<Stream> {
    let panicked = |_| Stream { error: Some("the client panicked".into()), ..Stream::default() };
    threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
}

fn outcome((streams, expected): (&[Stream], &[String]), took: Duration, since_s: f64) -> Outcome {
    let is_lost = |stream: &&Stream| stream.error.is_some();
    let differs =
        |(stream, text): &(&Stream, &String)| stream.error.is_none() && stream.text != **text;
    let mut stalls_s: Vec<f64> =
        streams.iter().filter_map(|stream| stream.stall_s(since_s)).collect();
    stalls_s.sort_by(f64::total_cmp);
    let mut pieces = Vec::new();
    for at_s in streams.iter().flat_map(|stream| &stream.pieces_s) {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
        let tenth = (at_s * 10.0) as usize;
        if pieces.len() <= tenth {
            pieces.resize(tenth + 1, 0);
        }
        pieces[tenth] += 1;
    }
    Outcome {
        streams: streams.len(),
        lost: streams.iter().filter(is_lost).count(),
        first_error: streams.iter().find_map(|stream| stream.error.clone()),
        different: streams.iter().zip(expected).filter(differs).count(),
        stalls_s,
        pieces,
        seconds: took.as_secs_f64(),
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_recv_response(Some(SILENCE_MAX))
        .http_status_as_error(false)
        .build()
        .into()
}

fn follow(url: &str, body: &Value, started: Instant, out: &mut Stream) -> anyhow::Result<()> {
    let mut answer = agent().post(url).send_json(body)?;
    if !answer.status().is_success() {
        bail!("{}: {}", answer.status(), answer.body_mut().read_to_string()?);
    }
    for line in BufReader::new(answer.into_body().into_reader()).lines() {
        let line = line.context("the connection broke")?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            return Ok(());
        }
        let event: Value = serde_json::from_str(data)?;
        if let Some(message) = event["error"]["message"].as_str() {
            bail!("{message}");
        }
        let text = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
        if !text.is_empty() {
            out.text.push_str(text);
            out.pieces_s.push(started.elapsed().as_secs_f64());
        }
    }
    bail!("the stream ended without its end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcome_counts_what_a_client_would_notice() {
        let stream = |text: &str, pieces_s: &[f64], error: Option<&str>| Stream {
            text: text.into(),
            pieces_s: pieces_s.to_vec(),
            error: error.map(Into::into),
        };
        let streams = [
            stream("a", &[0.05, 0.25, 0.26], None),
            stream("x", &[0.1, 1.1], None),
            stream("", &[], Some("gone")),
        ];
        let expected = ["a", "b", "c"].map(String::from);
        let of = |since_s| outcome((&streams, &expected), Duration::from_secs(2), since_s);
        let outcome = of(0.0);
        assert_eq!((outcome.lost, outcome.different), (1, 1));
        assert_eq!(outcome.first_error.as_deref(), Some("gone"));
        assert_eq!(outcome.pieces, [1, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        // The first stream was over by then, and the third never began.
        assert_eq!((of(0.5).streams, of(0.5).stalls_s.as_slice()), (3, [1.0].as_slice()));
        assert_eq!(of(0.2).stalls_s.len(), 2);
        assert!(
            (outcome.stall_s(0.0) - 0.2).abs() < 1e-9 && (outcome.stall_s(0.99) - 1.0).abs() < 1e-9
        );
    }
}
