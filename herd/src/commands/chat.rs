//! `herd chat`: a conversation in the terminal, streamed.

use super::DEFAULT_LISTEN;
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::time::Duration;
use tokio::sync::mpsc;

/// Pieces of an answer between the connection's thread and the terminal.
const PIECES_MAX: usize = 64;
/// Longest wait for a connection.
const CONNECT_MAX: Duration = Duration::from_secs(5);
const HELP: &str = "\
/help          this text
/clear         start a new conversation
/system TEXT   start a new conversation with this system prompt
/undo          forget the last question and its answer
/quit          leave (so does Ctrl-D)
Ctrl-C stops an answer.";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The router to talk to, `http://host:port`.
    #[arg(long, default_value_t = format!("http://{DEFAULT_LISTEN}"), env = "HERD_URL")]
    url: String,
    /// Model to ask for; the first that is served if not given.
    #[arg(long)]
    model: Option<String>,
    /// System prompt.
    #[arg(long)]
    system: Option<String>,
    /// Sampling temperature; the model's own if not given.
    #[arg(long)]
    temperature: Option<f32>,
    /// Longest answer, in tokens.
    #[arg(long)]
    max_tokens: Option<u32>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let url = args.url.trim_end_matches('/').to_owned();
    let model = match &args.model {
        Some(model) => model.clone(),
        None => first_model(&url)?,
    };
    let mut chat = Chat { url, model, messages: Vec::new(), args };
    chat.clear(args.system.as_deref());
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    let result = runtime.block_on(chat.talk());
    // The thread that reads the terminal cannot be woken.
    runtime.shutdown_background();
    result
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .timeout_connect(Some(CONNECT_MAX))
        .http_status_as_error(false)
        .build();
    config.into()
}

fn first_model(url: &str) -> anyhow::Result<String> {
    let mut answer = agent()
        .get(format!("{url}/v1/models"))
        .call()
        .with_context(|| format!("no herd router answers at {url}; start one with `herd up`"))?;
    let models: Value = answer.body_mut().read_json()?;
    let id = models["data"][0]["id"].as_str();
    id.map(str::to_owned).with_context(|| format!("{url} serves no model: {models}"))
}

struct Chat<'a> {
    url: String,
    model: String,
    messages: Vec<Value>,
    args: &'a Args,
}

/// What a line of the user asks for.
#[derive(Debug, PartialEq)]
enum Line<'a> {
    Nothing,
    Say(&'a str),
    Help,
    Clear,
    System(&'a str),
    Undo,
    Quit,
    Unknown(&'a str),
}

fn parse(line: &str) -> Line<'_> {
    let line = line.trim();
    let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    match command {
        "" => Line::Nothing,
        "/help" | "/?" => Line::Help,
        "/clear" | "/new" => Line::Clear,
        "/system" => Line::System(rest.trim()),
        "/undo" => Line::Undo,
        "/quit" | "/exit" | "/bye" => Line::Quit,
        _ if command.starts_with('/') => Line::Unknown(command),
        _ => Line::Say(line),
    }
}

/// What the connection's thread sends.
enum Piece {
    Text(String),
    Failed(String),
}

impl Chat<'_> {
    async fn talk(&mut self) -> anyhow::Result<()> {
        let prompts = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        if prompts {
            println(&format!("{} at {}; /help lists the commands", self.model, self.url));
        }
        let mut lines = stdin_lines();
        loop {
            if prompts {
                print("> ");
            }
            let line = tokio::select! {
                line = lines.recv() => line,
                _ = tokio::signal::ctrl_c() => None,
            };
            let Some(line) = line else {
                if prompts {
                    println("");
                }
                return Ok(());
            };
            match parse(&line) {
                Line::Nothing => {}
                Line::Help => println(HELP),
                Line::Clear => self.clear(self.args.system.as_deref()),
                Line::System(text) => self.clear(Some(text).filter(|text| !text.is_empty())),
                Line::Undo => self.undo(),
                Line::Quit => return Ok(()),
                Line::Unknown(command) => {
                    println(&format!("{command} is no command; /help lists them"));
                }
                Line::Say(text) => {
                    let result = self.ask(text).await;
                    match result {
                        Ok(()) => {}
                        // A script must see that it failed; a person can try again.
                        Err(error) if prompts => println(&format!("error: {error:#}")),
                        Err(error) => return Err(error),
                    }
                }
            }
        }
    }

    fn clear(&mut self, system: Option<&str>) {
        self.messages.clear();
        self.messages.extend(system.map(|system| json!({ "role": "system", "content": system })));
    }

    fn undo(&mut self) {
        let last = self.messages.iter().rposition(|message| message["role"] == "user");
        match last {
            Some(last) => self.messages.truncate(last),
            None => println("there is nothing to undo"),
        }
    }

    /// Asks, prints the answer as it comes and keeps both; on an error it keeps neither.
    async fn ask(&mut self, text: &str) -> anyhow::Result<()> {
        self.messages.push(json!({ "role": "user", "content": text }));
        let mut body = json!({ "model": self.model, "messages": self.messages, "stream": true });
        if let Some(temperature) = self.args.temperature {
            body["temperature"] = json!(temperature);
        }
        if let Some(max_tokens) = self.args.max_tokens {
            body["max_tokens"] = json!(max_tokens);
        }
        let (sender, mut pieces) = mpsc::channel(PIECES_MAX);
        let url = format!("{}/v1/chat/completions", self.url);
        tokio::task::spawn_blocking(move || stream(&url, &body, &sender));
        let mut answer = String::new();
        loop {
            let piece = tokio::select! {
                piece = pieces.recv() => piece,
                // Dropping the channel ends the thread at its next piece, and with it the request.
                _ = tokio::signal::ctrl_c() => None,
            };
            match piece {
                Some(Piece::Text(text)) => {
                    print(&text);
                    answer.push_str(&text);
                }
                Some(Piece::Failed(error)) => {
                    self.messages.pop();
                    bail!(error);
                }
                None => break,
            }
        }
        println("");
        self.messages.push(json!({ "role": "assistant", "content": answer }));
        Ok(())
    }
}

/// Reads the answer's events on a thread of its own and sends their text.
fn stream(url: &str, body: &Value, pieces: &mpsc::Sender<Piece>) {
    if let Err(error) = try_stream(url, body, pieces) {
        // The user may have stopped listening.
        let _stopped = pieces.blocking_send(Piece::Failed(format!("{error:#}")));
    }
}

fn try_stream(url: &str, body: &Value, pieces: &mpsc::Sender<Piece>) -> anyhow::Result<()> {
    let mut answer = agent().post(url).send_json(body).context("the router does not answer")?;
    if !answer.status().is_success() {
        let status = answer.status();
        let error: Value = answer.body_mut().read_json().unwrap_or_default();
        bail!("{status}: {}", error["error"]["message"].as_str().unwrap_or("no message"));
    }
    let reader = BufReader::new(answer.into_body().into_reader());
    for line in reader.lines() {
        let line = line.context("the connection broke in the middle of the answer")?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            return Ok(());
        }
        let event: Value = serde_json::from_str(data).context("the answer is no event stream")?;
        if let Some(message) = event["error"]["message"].as_str() {
            bail!("{message}");
        }
        let text = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
        if !text.is_empty() && pieces.blocking_send(Piece::Text(text.to_owned())).is_err() {
            return Ok(());
        }
    }
    bail!("the answer broke off; ask again")
}

/// Lines of the terminal, read on a thread: a blocked read cannot be cancelled.
fn stdin_lines() -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel(1);
    tokio::task::spawn_blocking(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// Nobody may be reading any more.
fn print(text: &str) {
    let mut stdout = std::io::stdout();
    let _closed = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

fn println(text: &str) {
    print(text);
    print("\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, want: Line<'_>) {
        assert_eq!(parse(line), want);
    }

    #[test]
    fn lines_are_commands_only_with_a_slash() {
        check("  ", Line::Nothing);
        check(" what is 1 / 2? ", Line::Say("what is 1 / 2?"));
        check("/system  be brief ", Line::System("be brief"));
        check("/system", Line::System(""));
        check("/quit", Line::Quit);
        check("/quti now", Line::Unknown("/quti"));
    }
}
