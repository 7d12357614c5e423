//! A repository of the hub: what the cache has of it, and what has to be downloaded.

use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};

use super::cache::Cached;
use super::nearby;
use super::remote::{About, Client, Failure, Listing};
use super::settings::Settings;

const HINT: &str = "give a local folder instead (for the pipeline: `--set model.path=DIR`), or fill the Hugging Face cache on a machine with network and set HF_HOME or HF_HUB_CACHE to it";

/// One repository at one revision. The files of a repository are listed once, so that looking for an optional file
/// costs no request.
#[derive(Debug)]
pub struct Hub {
    id: String,
    revision: String,
    client: Client,
    cache: Cached,
    offline: bool,
    listing: OnceLock<Result<Listing, Failure>>,
}

impl Hub {
    /// Honours the variables that `huggingface_hub` reads: see [`Settings`].
    ///
    /// # Errors
    /// `HF_ENDPOINT` is no address.
    pub fn from_env(id: &str, revision: &str) -> Result<Self> {
        Self::new(&Settings::from_env(), id, revision)
    }

    fn new(settings: &Settings, id: &str, revision: &str) -> Result<Self> {
        let client = Client::new(&settings.endpoint, settings.token.clone())?;
        let cache = Cached::new(&settings.cache, id);
        let offline = settings.offline;
        Ok(Self { id: id.into(), revision: revision.into(), client, cache, offline, listing: OnceLock::new() })
    }

    /// `owner/name[@revision]`.
    pub fn label(&self) -> String {
        if self.revision == "main" { self.id.clone() } else { format!("{}@{}", self.id, self.revision) }
    }

    /// Where a file called `label` was looked for; says so when it may only be missing because the hub was not asked.
    pub fn looked_at(&self, label: &str) -> String {
        if self.offline {
            return format!("the cached files of {label}; unset HF_HUB_OFFLINE to download");
        }
        match self.listing.get() {
            Some(Err(failure)) => format!("the cached files of {label}, and {failure}"),
            _ => format!("{label} on the hub"),
        }
    }

    /// The path of a file in the cache, downloaded where needed; `None` when the repository has no such file.
    ///
    /// # Errors
    /// When the hub refuses the repository, or cannot be reached and the cache knows nothing of it.
    pub fn find(&self, file: &str) -> Result<Option<PathBuf>> {
        if !Path::new(file).components().all(|part| matches!(part, Component::Normal(_))) {
            return Ok(None);
        }
        let commit = self.cache.commit(&self.revision);
        let cached = commit.as_ref().and_then(|commit| self.cache.find(commit, file));
        // A full commit hash names one content for ever: nothing to ask.
        if cached.is_some() && (self.offline || is_commit(&self.revision)) {
            return Ok(cached);
        }
        if self.offline {
            let commit = commit.with_context(|| {
                format!(
                    "{} is not in the Hugging Face cache {} and HF_HUB_OFFLINE forbids asking the hub; {HINT}",
                    self.label(),
                    self.cache.root().display()
                )
            })?;
            return check_link(&self.cache.snapshot(&commit, file)).map(|()| None);
        }
        match (self.listing.get_or_init(|| self.list()), commit) {
            (Ok(listing), _) if !listing.files.contains(file) => Ok(None),
            (Ok(listing), _) => match listing.commit.as_ref().and_then(|commit| self.cache.find(commit, file)) {
                Some(path) => Ok(Some(path)),
                None => self.download(file, listing.commit.as_deref(), cached).map(Some),
            },
            // Something of the repository is cached: work with that, as HF_HUB_OFFLINE would.
            (Err(_), Some(_)) if cached.is_some() => Ok(cached),
            (Err(failure), Some(commit)) if !failure.may_have_files() => {
                check_link(&self.cache.snapshot(&commit, file)).map(|()| None)
            }
            (Err(failure), _) => self.find_unlisted(file, failure),
        }
    }

    /// A file of a server that has no list of the repository's files.
    fn find_unlisted(&self, file: &str, failure: &Failure) -> Result<Option<PathBuf>> {
        let about = match failure.may_have_files() {
            true => self.client.about(&self.id, &self.revision, file),
            false => Err(failure.clone()),
        };
        match about {
            Ok(about) => self.add(file, &about, None).map(Some),
            Err(Failure::NoSuchFile) => Ok(None),
            Err(_) => Err(anyhow!("cannot get `{file}` of {}: {failure}; {}", self.label(), self.hint(failure))),
        }
    }

    /// Whether there is such a file, as far as the cache or the repository's listing tells. Asks nobody.
    pub fn has(&self, file: &str) -> bool {
        match self.listing.get() {
            Some(Ok(listing)) => listing.files.contains(file),
            _ => self.cache.commit(&self.revision).is_some_and(|commit| self.cache.find(&commit, file).is_some()),
        }
    }

    fn hint(&self, failure: &Failure) -> String {
        if failure.is_refusal() {
            let near = nearby(Path::new(&self.id));
            return format!("check the name{near}, and for a gated repository accept its terms and set HF_TOKEN");
        }
        HINT.into()
    }

    fn list(&self) -> Result<Listing, Failure> {
        self.client.list(&self.id, &self.revision).inspect_err(|failure| {
            if self.cache.commit(&self.revision).is_some() {
                note!("warning: {}: {failure}; using the cached files", self.label());
            }
        })
    }

    /// Downloads `file`; an older cached copy serves when that fails.
    fn download(&self, file: &str, commit: Option<&str>, cached: Option<PathBuf>) -> Result<PathBuf> {
        let about = self.client.about(&self.id, &self.revision, file);
        let hint = about.as_ref().err().map_or_else(|| HINT.to_owned(), |failure| self.hint(failure));
        let path = about.map_err(anyhow::Error::from).and_then(|about| self.add(file, &about, commit));
        match (path, cached) {
            (Ok(path), _) => Ok(path),
            (Err(e), Some(path)) => {
                note!("warning: downloading `{file}` of {} failed ({e:#}); using the cached copy", self.label());
                Ok(path)
            }
            (Err(e), None) => Err(e.context(format!("downloading `{file}` of {}; {hint}", self.label()))),
        }
    }

    /// Puts a file into the cache; `commit` counts where the server does not tell the file's.
    fn add(&self, file: &str, about: &About, commit: Option<&str>) -> Result<PathBuf> {
        let hash = is_commit(&self.revision).then_some(&*self.revision);
        let commit = about.commit.as_deref().or(commit).or(hash).with_context(|| {
            format!(
                "{} does not say which commit it has (no X-Repo-Commit); give the commit's hash: `{}@HASH`",
                self.client.endpoint(),
                self.id
            )
        })?;
        // bytes without a name of their own are named for their place
        let etag = about.etag.clone().unwrap_or_else(|| format!("{commit}--{}", file.replace('/', "--")));
        let path = self.cache.add(commit, file, &etag, |path| self.client.fetch(about, path))?;
        self.cache.set_commit(&self.revision, commit)?;
        Ok(path)
    }
}

/// # Errors
/// The path is a link, and what it points to is not there.
pub fn check_link(path: &Path) -> Result<()> {
    if path.is_symlink() {
        bail!(
            "{} is a link to a file that is gone; copy the whole cache (`blobs` too) or the files themselves (`cp -rL`), or download it again",
            path.display()
        );
    }
    Ok(())
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BODY, DEAD, FILE, Faults, Server};
    use super::*;
    use std::fs;

    fn hub(endpoint: &str, cache: &Path, offline: bool) -> Hub {
        let settings = Settings { endpoint: endpoint.into(), cache: cache.into(), token: None, offline };
        Hub::new(&settings, "owner/name", "main").unwrap()
    }

    /// What a server with these faults gives for its file, or why not.
    fn fetched(faults: &Faults) -> Result<String> {
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(faults);
        let hub = Hub::new(&server.settings(cache.path()), "owner/name", "main")?;
        assert_eq!(hub.find("none.json")?, None);
        let path = hub.find(FILE)?.context("it says that there is no such file")?;
        // found again without the server
        let again = self::hub(DEAD, cache.path(), true).find(FILE)?;
        assert_eq!(again.as_deref(), Some(&*path));
        Ok(fs::read_to_string(path)?)
    }

    fn fill(cache: &Path, commit: &str) {
        let repo = cache.join("models--owner--name");
        fs::create_dir_all(repo.join("refs")).unwrap();
        fs::create_dir_all(repo.join("snapshots").join(commit).join("unet")).unwrap();
        fs::write(repo.join("refs/main"), format!("{commit}\n")).unwrap();
        fs::write(repo.join("snapshots").join(commit).join(FILE), "{}").unwrap();
    }

    #[test]
    fn the_cache_serves_when_the_hub_is_away_or_forbidden() {
        let cache = tempfile::tempdir().unwrap();
        for offline in [true, false] {
            let e = hub(DEAD, cache.path(), offline).find(FILE).unwrap_err().to_string();
            assert!(e.contains("owner/name") && e.contains("model.path=DIR"), "{e}");
            assert!(offline || e.contains("could not be reached"), "{e}");
        }
        fill(cache.path(), "c1");
        for offline in [true, false] {
            let hub = hub(DEAD, cache.path(), offline);
            assert!(hub.find(FILE).unwrap().is_some());
            assert!(hub.find("unet/none.json").unwrap().is_none());
            let where_ = hub.looked_at("owner/name:unet");
            let why = if offline { "HF_HUB_OFFLINE" } else { "reached" };
            assert!(where_.contains("owner/name:unet") && where_.contains(why), "{where_}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_whose_file_is_gone_is_named_where_it_cannot_be_mended() {
        let cache = tempfile::tempdir().unwrap();
        fill(cache.path(), "c0");
        let link = cache.path().join("models--owner--name/snapshots/c0").join(FILE);
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("../../../blobs/gone", &link).unwrap();
        for offline in [true, false] {
            let e = hub(DEAD, cache.path(), offline).find(FILE).unwrap_err().to_string();
            assert!(e.contains(FILE) && e.contains("is gone"), "{e}");
        }
        let server = Server::start(&Faults::default());
        let path = hub(&server.endpoint, cache.path(), false).find(FILE).unwrap().unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), BODY);
    }

    #[test]
    fn every_server_that_python_reads_will_do_and_some_more() {
        let elsewhere = Server::start(&Faults::default());
        for (what, faults) in [
            ("a whole hub", Faults::default()),
            ("no ranges", Faults { no_ranges: true, ..Faults::default() }),
            ("no commit", Faults { no_commit: true, ..Faults::default() }),
            ("no ETag", Faults { no_etag: true, ..Faults::default() }),
            ("a weak ETag", Faults { etag: Some("W/\"5f-a1\""), ..Faults::default() }),
            ("an ETag that is no name", Faults { etag: Some("\"../../up\""), ..Faults::default() }),
            ("no length", Faults { chunked: true, ..Faults::default() }),
            ("no HEAD", Faults { no_head: true, ..Faults::default() }),
            ("a redirect to a path", Faults { redirect: Some(String::new()), ..Faults::default() }),
            ("a redirect to a host", Faults { redirect: Some(elsewhere.endpoint), ..Faults::default() }),
            ("an endpoint with a path", Faults { below: "/mirrors/hub", ..Faults::default() }),
            ("no list", Faults { no_list: Some(404), ..Faults::default() }),
            ("a list that fails", Faults { no_list: Some(500), ..Faults::default() }),
            ("breaking off", Faults { truncated: 1, ..Faults::default() }),
            ("breaking off without ranges", Faults { truncated: 1, no_ranges: true, ..Faults::default() }),
            ("breaking off without a length", Faults { truncated: 1, chunked: true, ..Faults::default() }),
        ] {
            let text = fetched(&faults).unwrap_or_else(|error| panic!("{what}: {error:#}"));
            assert_eq!(text, BODY, "{what}");
        }
    }

    #[test]
    fn what_cannot_be_known_to_be_whole_is_refused() {
        let e = format!("{:#}", fetched(&Faults { truncated: 9, no_ranges: true, ..Faults::default() }).unwrap_err());
        assert!(e.contains(FILE) && e.contains("model.path=DIR"), "{e}");
        let e = format!("{:#}", fetched(&Faults { unframed: true, ..Faults::default() }).unwrap_err());
        assert!(e.contains(FILE) && e.contains("Content-Length"), "{e}");
        let e = fetched(&Faults { no_list: Some(404), no_commit: true, ..Faults::default() }).unwrap_err().to_string();
        assert!(e.contains("X-Repo-Commit") && e.contains("owner/name@HASH"), "{e}");
    }

    #[test]
    fn a_refusal_is_told_from_a_failure() {
        for code in [401, 403, 404] {
            let e = fetched(&Faults { refuses: Some(code), ..Faults::default() }).unwrap_err().to_string();
            assert!(e.contains(&format!("status {code}")) && e.contains("gated") && e.contains("HF_TOKEN"), "{e}");
            assert!(e.contains("ask the owner"), "{e}");
        }
        let e = fetched(&Faults { refuses: Some(503), ..Faults::default() }).unwrap_err().to_string();
        assert!(e.contains("could not be reached") && e.contains("503"), "{e}");
        // with something in the cache, that is used
        let cache = tempfile::tempdir().unwrap();
        fill(cache.path(), "old");
        let server = Server::start(&Faults { refuses: Some(503), ..Faults::default() });
        let path = hub(&server.endpoint, cache.path(), false).find(FILE).unwrap().unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "{}");
    }

    #[test]
    fn a_download_goes_on_where_it_broke_off_and_is_done_once() {
        let cache = tempfile::tempdir().unwrap();
        let blobs = cache.path().join("models--owner--name/blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join("e1.incomplete"), &BODY[..10]).unwrap();
        let server = Server::start(&Faults::default());
        for _ in 0..2 {
            let path = hub(&server.endpoint, cache.path(), false).find(FILE).unwrap().unwrap();
            assert_eq!(fs::read_to_string(path).unwrap(), BODY);
        }
        assert_eq!((server.requests("get /owner/"), server.requests("range: bytes=10-")), (1, 1));
        assert!(blobs.join("e1").is_file() && !blobs.join("e1.incomplete").exists());
    }

    #[test]
    fn a_token_goes_to_the_hub_alone() {
        let cache = tempfile::tempdir().unwrap();
        let elsewhere = Server::start(&Faults::default());
        let server = Server::start(&Faults { redirect: Some(elsewhere.endpoint.clone()), ..Faults::default() });
        let settings = Settings { token: Some("hf_secret".into()), ..server.settings(cache.path()) };
        Hub::new(&settings, "owner/name", "main").unwrap().find(FILE).unwrap().unwrap();
        let all = server.requests("http/1.1");
        assert_eq!(server.requests("authorization: bearer hf_secret"), all);
        assert!(elsewhere.requests("http/1.1") > 0 && elsewhere.requests("hf_secret") == 0);
    }

    #[test]
    fn an_endpoint_has_to_be_an_address() {
        let settings = Settings { endpoint: "mirror.local".into(), cache: "c".into(), token: None, offline: true };
        let e = Hub::new(&settings, "owner/name", "main").unwrap_err().to_string();
        assert!(e.contains("HF_ENDPOINT") && e.contains("mirror.local"), "{e}");
    }
}
