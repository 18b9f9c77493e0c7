//! Service tags: built in, of the policy, and of Azure's published file (`reference/azure.md` §1.4).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::diagnostics::Problems;
use super::fields::{Complaint, Fields, parse_text};
use super::names::{check_name, nearest};
use super::network::{ServiceTag, TagDefinition};
use super::register::Register;
use super::source::{Span, Text};
use super::tree::Node;
use super::{prefixes, shape, tag_file};

/// Tags that mean something of this policy; by REST name and by the classic deployment model's.
const BUILT_IN: &[(&str, ServiceTag)] = &[
    ("VirtualNetwork", ServiceTag::VirtualNetwork),
    ("Internet", ServiceTag::Internet),
    ("AzureLoadBalancer", ServiceTag::AzureLoadBalancer),
    ("AzurePlatformDNS", ServiceTag::AzurePlatformDns),
    ("AzurePlatformIMDS", ServiceTag::AzurePlatformImds),
    ("AzurePlatformLKM", ServiceTag::AzurePlatformLkm),
    ("VIRTUAL_NETWORK", ServiceTag::VirtualNetwork),
    ("AZURE_LOADBALANCER", ServiceTag::AzureLoadBalancer),
];

/// How many tags of a file with something skipped are named one by one.
const NAMED_SKIPS: usize = 20;

/// All tags by name, without regard to case.
#[derive(Debug, Default)]
pub struct Tags {
    by_name: HashMap<String, usize>,
    /// What the names stand for that are not built in.
    pub definitions: Vec<TagDefinition>,
    /// The tag file, if one is named.
    pub file: Option<PathBuf>,
    /// Could it not be read?
    unreadable: bool,
}

fn built_in(name: &str) -> Option<ServiceTag> {
    BUILT_IN.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, tag)| *tag)
}

/// Is this one of the tags that stand for the platform's own services? They are meant to be denied, outbound only.
pub fn is_platform(tag: ServiceTag) -> bool {
    use ServiceTag::{AzurePlatformDns, AzurePlatformImds, AzurePlatformLkm};
    matches!(tag, AzurePlatformDns | AzurePlatformImds | AzurePlatformLkm)
}

impl Tags {
    /// The tag of this name.
    pub fn get(&self, name: &str) -> Option<ServiceTag> {
        built_in(name)
            .or_else(|| self.by_name.get(&name.to_ascii_lowercase()).map(|index| ServiceTag::Named(*index)))
    }

    /// What to make of a name that no tag has: an error, with the tag that was probably meant. After a tag file that
    /// could not be read, which has been reported, any name may be one of its tags; what is returned then is never used.
    pub fn missing(&self, name: &str) -> Result<ServiceTag, Complaint> {
        if self.unreadable {
            return Ok(ServiceTag::Named(usize::MAX));
        }
        let complaint = Complaint::new(format!("there is no service tag `{name}`"));
        let known = BUILT_IN.iter().map(|(name, _)| *name);
        let known = known.chain(self.definitions.iter().map(|tag| tag.name.as_str()));
        Err(match nearest(name, known) {
            Some(near) => complaint.help(format!("did you mean `{near}`?")),
            None if self.file.is_some() => complaint.help(
                "neither the tag file nor `serviceTags.tags` has it; a newer tag file may, anything else is an \
                 address or a prefix",
            ),
            None => complaint.help(
                "VirtualNetwork, Internet, AzureLoadBalancer and the AzurePlatform tags are built in; for Azure's others \
                 name its tag file under `serviceTags: { file: ... }`, for your own use `serviceTags: { tags: [...] }`; \
                 anything else is an address or a prefix",
            ),
        })
    }

    fn define(&mut self, definition: TagDefinition) {
        self.by_name.insert(definition.name.to_ascii_lowercase(), self.definitions.len());
        self.definitions.push(definition);
    }
}

/// Reads `serviceTags`; a relative file name counts from `folder`.
pub fn read(
    node: Option<&Node<'_>>,
    folder: &Path,
    register: &mut Register,
    problems: &mut Problems,
) -> Tags {
    let mut tags = Tags::default();
    let Some(fields) = node.and_then(|node| Fields::open(node, &shape::SERVICE_TAGS, problems)) else {
        return tags;
    };
    let file = fields.text("file", problems);
    if let Some(file) = &file {
        tags.file = Some(folder.join(&file.value));
        register.add(&["serviceTags"], file.span);
        read_file(&mut tags, file, folder, problems);
    }
    let mut places: HashMap<String, Span> = HashMap::new();
    for item in fields.list("tags", problems) {
        let Some((name, definition)) = read_tag(item, problems) else { continue };
        check_name(&name, "service tag", problems);
        register.add(&["serviceTags", &name.value], name.span);
        let key = name.value.to_ascii_lowercase();
        if built_in(&name.value).is_some() {
            problems
                .error(name.span, format!("service tag `{}` is built in and cannot be redefined", name.value))
                .help("choose another name for your own tag");
        } else if let Some(first) = places.get(&key) {
            problems
                .error(name.span, format!("a second service tag is named `{}`", name.value))
                .also(*first, "the first one")
                .help(
                    "names are compared without regard to case: rename one of them, or join their prefixes",
                );
        } else if let (Some(_), Some(file)) = (tags.by_name.get(&key), &file) {
            problems
                .error(name.span, format!("service tag `{}` is in the tag file too", name.value))
                .also(file.span, "the tag file")
                .help("choose another name: rules could not tell which of the two is meant");
        } else {
            places.insert(key, name.span);
            tags.define(definition);
        }
    }
    tags
}

fn read_tag(node: &Node<'_>, problems: &mut Problems) -> Option<(Text, TagDefinition)> {
    let fields = Fields::open(node, &shape::SERVICE_TAG, problems)?;
    let name = fields.text("name", problems);
    let items = fields.texts("addressPrefixes", problems);
    if fields.is_empty_list("addressPrefixes") {
        problems
            .error(fields.key("addressPrefixes"), format!("{} stands for nothing", fields.title))
            .help("add at least one address or prefix");
    }
    // A tag that is named but wrong is still known, so that rules with it are not reported as well.
    let nets = items.into_iter().filter_map(|text| parse_text(text, prefixes::parse_network, problems));
    let prefixes = nets.map(|net| net.value).collect();
    let name = name?;
    let definition = TagDefinition { name: name.value.clone(), prefixes };
    Some((name, definition))
}

fn read_file(tags: &mut Tags, file: &Text, folder: &Path, problems: &mut Problems) {
    let path = folder.join(&file.value);
    let read = match tag_file::read(&path) {
        Ok(read) => read,
        Err(complaint) => {
            tags.unreadable = true;
            return complaint.report(file.span, problems);
        }
    };
    let mut skipped = read.skipped;
    for tag in read.tags {
        if built_in(&tag.name).is_some() {
            skipped.push((tag.name, "is built in: the file's is not used".to_owned()));
        } else if tags.by_name.contains_key(&tag.name.to_ascii_lowercase()) {
            problems
                .error(file.span, format!("{}: two service tags are named `{}`", path.display(), tag.name))
                .help("Azure's file has every tag once: download it again");
        } else {
            tags.define(tag);
        }
    }
    for (tag, why) in skipped.iter().take(NAMED_SKIPS) {
        problems
            .warning(file.span, format!("{}: service tag `{tag}` {why}", path.display()))
            .help("the rest of the file is used; compare with a fresh download");
    }
    if skipped.len() > NAMED_SKIPS {
        let more = skipped.len() - NAMED_SKIPS;
        problems
            .warning(file.span, format!("{}: the same goes for {more} more service tags", path.display()))
            .help("the rest of the file is used; compare with a fresh download");
    }
}
