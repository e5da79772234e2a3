//! The mesh in one command, as a script of claims: what is applied, what is seen, and whether it is what was meant.

pub(crate) mod app;
mod board;
mod claims;
mod load;
mod process;
mod topology;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;

use crate::cli::Demo;
use crate::output::data;
use board::Board;
use claims::Claims;
use load::{Load, Tally};
use topology::Mesh;

/// Requests at a time.
const CONCURRENCY: usize = 16;

/// Requests for a claim that is about every request, not about shares.
const SAMPLE: u32 = 200;

/// How far a share may be from what was asked for, in percentage points.
const TOLERANCE: f64 = 2.0;

/// The files that the demo applies, in order.
const CANARY: [(&str, &str, f64); 3] = [
    ("3-canary-10.yaml", include_str!("demo/mesh/3-canary-10.yaml"), 10.0),
    ("4-canary-50.yaml", include_str!("demo/mesh/4-canary-50.yaml"), 50.0),
    ("5-canary-100.yaml", include_str!("demo/mesh/5-canary-100.yaml"), 100.0),
];

/// Runs the demo.
///
/// # Errors
///
/// What did not start or was refused; a claim that does not hold is told by the exit code.
pub(crate) async fn run(args: &Demo) -> anyhow::Result<ExitCode> {
    let folder = scratch()?;
    let mut board = Board::new();
    board.say("starting istiod, six services and seven proxies on loopback addresses ...")?;
    let mut mesh = Mesh::start(&folder, !args.check)
        .await
        .with_context(|| format!("logs are in {}", folder.display()))?;
    let mut claims = Claims::default();
    let told = Story {
        mesh: &mut mesh,
        board: &mut board,
        claims: &mut claims,
        requests: args.requests,
        check: args.check,
    }
    .tell()
    .await;
    let outcome = match told {
        Ok(()) if args.check => finish(&claims),
        Ok(()) => stay(&mesh, &mut board, &folder).await,
        Err(error) => Err(error.context(format!("logs are in {}", folder.display()))),
    };
    mesh.stop().await;
    if outcome.is_ok() {
        std::fs::remove_dir_all(&folder)?;
    }
    outcome
}

fn finish(claims: &Claims) -> anyhow::Result<ExitCode> {
    data(&claims.summary())?;
    Ok(if claims.all_hold() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A folder of its own for data and logs.
fn scratch() -> anyhow::Result<std::path::PathBuf> {
    let folder =
        std::env::temp_dir().join(format!("istio-demo-{}-{:08x}", std::process::id(), fastrand::u32(..)));
    std::fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

/// The demo while it is told.
struct Story<'a> {
    mesh: &'a mut Mesh,
    board: &'a mut Board,
    claims: &'a mut Claims,
    requests: u32,
    check: bool,
}

impl Story<'_> {
    async fn tell(mut self) -> anyhow::Result<()> {
        let up = self.mesh.first_answer;
        self.claim(
            "the mesh is up",
            "first answer over mTLS within 5 s",
            up < Duration::from_secs(5),
            format!("{up:.2?}"),
        )?;
        self.identities().await?;
        self.strict().await?;
        for (file, yaml, share) in CANARY {
            self.canary(file, yaml, share).await?;
        }
        self.header().await?;
        self.fault().await?;
        self.deny().await?;
        self.revisions().await
    }

    async fn identities(&mut self) -> anyhow::Result<()> {
        self.board
            .say("\n== every call is mTLS, and every server knows its caller by its SPIFFE identity")?;
        let tally = self.traffic(None, SAMPLE * 2).await?;
        for (service, caller) in [
            ("productpage", "ingress"),
            ("details", "productpage"),
            ("reviews", "productpage"),
            ("ratings", "reviews"),
        ] {
            let expected = format!("spiffe://cluster.local/ns/default/sa/{caller}");
            let seen = tally.callers.get(service).cloned().unwrap_or_default();
            let holds = seen.len() == 1 && seen.contains(&expected);
            self.claim(&format!("{service} sees its caller"), &expected, holds, format!("{seen:?}"))?;
        }
        self.no_failures("without any route", &tally)
    }

    async fn strict(&mut self) -> anyhow::Result<()> {
        self.board
            .say("\n== PeerAuthentication STRICT: without a certificate of this mesh there is no way in")?;
        let address = self.mesh.inbound("reviews-v1")?;
        let plain = claims::plaintext(address).await;
        self.claim(
            "plaintext is refused",
            "the connection is closed without an answer",
            plain.is_err(),
            claims::words(&plain),
        )?;
        let foreign = claims::foreign_certificate(address).await;
        self.claim(
            "a certificate of another CA is refused",
            "no answer",
            foreign.is_err(),
            claims::words(&foreign),
        )
    }

    async fn canary(&mut self, file: &str, yaml: &str, share: f64) -> anyhow::Result<()> {
        self.apply(file, yaml).await?;
        let tally = self.traffic(None, self.requests).await?;
        let seen = tally.share("reviews", "v2");
        self.claim(
            &format!("reviews v2 gets {share:.0} % of {} requests", self.requests),
            &format!("{share:.1} % within {TOLERANCE} points"),
            (seen - share).abs() <= TOLERANCE && tally.total == self.requests,
            format!("{seen:.2} %, p50 {:.1} ms, p99 {:.1} ms", tally.latency(0.5), tally.latency(0.99)),
        )?;
        self.no_failures(&format!("at {share:.0} %"), &tally)
    }

    async fn header(&mut self) -> anyhow::Result<()> {
        self.apply("6-header.yaml", include_str!("demo/mesh/6-header.yaml")).await?;
        let jason = self.traffic(Some("jason"), SAMPLE).await?;
        let others = self.traffic(None, SAMPLE).await?;
        let (v3, v1) = (jason.share("reviews", "v3"), others.share("reviews", "v1"));
        self.claim(
            "user jason sees reviews v3",
            "100 %",
            v3 >= 100.0 && jason.failed == 0,
            format!("{v3:.1} %"),
        )?;
        self.claim(
            "all others see reviews v1",
            "100 %",
            v1 >= 100.0 && others.failed == 0,
            format!("{v1:.1} %"),
        )
    }

    async fn fault(&mut self) -> anyhow::Result<()> {
        self.apply("7-fault.yaml", include_str!("demo/mesh/7-fault.yaml")).await?;
        let aborted = self.traffic(Some("tester"), SAMPLE).await?;
        let with_555 = aborted.statuses.get("details").and_then(|s| s.get(&555)).copied().unwrap_or_default();
        self.claim(
            "calls of user tester to details fail with 555",
            "every one",
            with_555 == SAMPLE,
            format!("{with_555} of {SAMPLE}"),
        )?;
        let slow = self.traffic(Some("snail"), SAMPLE).await?;
        let p50 = slow.latency(0.5);
        self.claim(
            "calls of user snail to details take 300 ms",
            "300 to 400 ms",
            (300.0..400.0).contains(&p50),
            format!("p50 {p50:.1} ms"),
        )?;
        let others = self.traffic(None, SAMPLE).await?;
        self.no_failures("for everybody else", &others)
    }

    async fn deny(&mut self) -> anyhow::Result<()> {
        self.apply("8-deny.yaml", include_str!("demo/mesh/8-deny.yaml")).await?;
        let address = self.mesh.address("ingress", "ratings")?;
        let load = Load { address, host: "ratings", user: None, requests: SAMPLE, concurrency: CONCURRENCY };
        let denied = load::send(&load).await;
        let with_403 = denied.statuses.get("ratings").and_then(|s| s.get(&403)).copied().unwrap_or_default();
        let words = denied.first_failure.unwrap_or_default();
        self.claim(
            "ingress may not read ratings",
            "403 RBAC: access denied",
            with_403 == SAMPLE && words.ends_with("403 RBAC: access denied"),
            format!("{with_403} of {SAMPLE}: {words}"),
        )?;
        let allowed = self.traffic(Some("jason"), SAMPLE).await?;
        let ratings =
            allowed.answers.get(&("ratings".to_owned(), "v1".to_owned())).copied().unwrap_or_default();
        self.claim(
            "reviews may",
            "every one",
            ratings == SAMPLE && allowed.failed == 0,
            format!("{ratings} of {SAMPLE}"),
        )
    }

    async fn revisions(&mut self) -> anyhow::Result<()> {
        let proxies = self.mesh.proxies().await?;
        let newest = proxies.iter().map(|p| p.revision).max().unwrap_or_default();
        let behind: Vec<_> =
            proxies.iter().filter(|p| p.revision != newest).map(|p| p.name.clone()).collect();
        self.claim(
            "every proxy runs the newest revision",
            "all",
            behind.is_empty() && newest > 0,
            format!("{} at {newest}", proxies.len()),
        )
    }

    async fn apply(&mut self, file: &str, yaml: &str) -> anyhow::Result<()> {
        let about = yaml.lines().next().unwrap_or_default().trim_start_matches("# ");
        self.board.say(&format!("\n== {file}: {about}"))?;
        let (revision, took) = self.mesh.apply(file, yaml).await?;
        self.claim(
            &format!("{file} runs on every proxy"),
            "within 1 s",
            took < Duration::from_secs(1),
            format!("revision {revision} after {took:.1?}"),
        )
    }

    async fn traffic(&mut self, user: Option<&'static str>, requests: u32) -> anyhow::Result<Tally> {
        let address = self.mesh.address("ingress", "productpage")?;
        let tally =
            load::send(&Load { address, host: "productpage", user, requests, concurrency: CONCURRENCY })
                .await;
        if !self.check {
            let proxies = self.mesh.proxies().await?;
            self.board.draw(&tally, &proxies)?;
        }
        Ok(tally)
    }

    fn no_failures(&mut self, when: &str, tally: &Tally) -> anyhow::Result<()> {
        let words = tally.first_failure.clone().unwrap_or_default();
        self.claim(
            &format!("no request fails {when}"),
            "0",
            tally.failed == 0 && tally.total > 0,
            format!("{} of {} {words}", tally.failed, tally.total),
        )
    }

    fn claim(&mut self, what: &str, expected: &str, holds: bool, seen: String) -> anyhow::Result<()> {
        let line = self.claims.add(what, expected, holds, seen);
        self.board.say(&line)
    }
}

/// Sends light traffic and shows it until Ctrl-C.
async fn stay(mesh: &Mesh, board: &mut Board, folder: &std::path::Path) -> anyhow::Result<ExitCode> {
    let address = mesh.address("ingress", "productpage")?;
    board.say(&format!(
        "\nThe mesh stays until Ctrl-C. Try:\n\n  \
         curl -H 'Host: productpage' http://{address}/\n  \
         curl -H 'Host: productpage' -H 'end-user: jason' http://{address}/\n  \
         alias istioctl={}\n  \
         export ISTIOCTL_SERVER={}\n  \
         istioctl proxy-status\n  \
         istioctl proxy-config route productpage-v1.default\n  \
         istioctl get all -o yaml\n  \
         istioctl history\n\nData and logs are in {}.\n",
        std::env::current_exe()?.display(),
        mesh.url,
        folder.display()
    ))?;
    let mut window = std::collections::VecDeque::new();
    let mut every = tokio::time::interval(Duration::from_millis(500));
    loop {
        tokio::select! {
            pressed = tokio::signal::ctrl_c() => {
                pressed?;
                return Ok(ExitCode::SUCCESS);
            }
            _ = every.tick() => {}
        }
        if !board.is_live() {
            continue;
        }
        let load = Load { address, host: "productpage", user: None, requests: 50, concurrency: 4 };
        window.push_back(load::send(&load).await);
        while window.len() > 20 {
            window.pop_front();
        }
        let mut tally = Tally::default();
        window.iter().cloned().for_each(|t| tally.merge(t));
        board.draw(&tally, &mesh.proxies().await?)?;
    }
}
